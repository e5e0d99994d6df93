"""Saving while training goes on: a thread writes what has been copied to host memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from mokd.checkpointing import storage
from mokd.config import CheckpointConfig
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)


class AsyncCheckpointer:
    """Publishes checkpoints of one attempt, one at a time: a new one waits until the one before is on the disk.

    before: called ahead of every save; published: told a step once its checkpoint is durable. Both are called by
    whichever thread writes.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        config: CheckpointConfig,
        before: Callable[[], None],
        published: Callable[[int], None],
    ) -> None:
        self._run, self._attempt, self._config = run, attempt, config
        self._before, self._published = before, published
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._success = True

    def save(self, step: int, snapshot: storage.Snapshot, facts: dict[str, Any]) -> None:
        """Writes a checkpoint: in the background, or at once where `storage.asynchronous` is off.

        Nobody may change the snapshot any more. What went wrong with the save before is raised here.
        """
        self.wait()
        # daemon: a process that ends in an error must not wait for it twice
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, facts), name="saver", daemon=True)
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> bool:
        """Waits for the save under way and raises its error; False where its disk was full."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
        return self._success

    def check(self) -> None:
        """Raises what a save has run into so far: a newer attempt, or a disk that is broken rather than full."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Lets the save under way finish when training has ended in an error of its own."""
        try:
            self.wait()
        except Exception as error:
            log.error("the last save failed: %s", error)

    def _write(self, step: int, snapshot: storage.Snapshot, facts: dict[str, Any]) -> None:
        try:
            self._before()
            self._success = storage.publish(self._run, self._attempt, step, snapshot, facts)
            if self._success:
                self._published(step)
                storage.prune(self._run, step, self._config.keep_last, self._config.keep_every_steps)
        except BaseException as error:
            self._error = error
