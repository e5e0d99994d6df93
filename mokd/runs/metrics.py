"""Metrics: one JSON object per line, and the same in TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mokd.runs.files import replace_text
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one attempt, continuing after `step`: what an earlier attempt logged beyond it is dropped.

    So a resumed run has every step once, in the file and in TensorBoard.
    """

    def __init__(self, run: RunDirectory, attempt: int, step: int, *, tensorboard: bool) -> None:
        self._run = run
        self._attempt = attempt
        _keep_up_to(run.metrics_file, step)
        self._stream = open(run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board: Any = _open_tensorboard(run.tensorboard, step) if tensorboard else None

    def write(self, values: Mapping[str, float | int]) -> None:
        """Appends one record; it must hold `step`. Refused to a leftover attempt."""
        self._run.check_attempt(self._attempt)
        # JSON has no NaN: a number that is none is written as null
        record = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in values.items()}
        try:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
            if self._board is not None:
                for key, value in values.items():
                    if key != "step":
                        self._board.add_scalar(key, value, int(values["step"]))
        except OSError as error:
            log.warning("%s: metrics cannot be written (%s); training goes on", self._run.path, error.strerror)

    def flush(self) -> None:
        """Brings everything to the disk."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            if self._board is not None:
                self._board.flush()
        except OSError as error:
            log.warning("%s: metrics cannot be written (%s); training goes on", self._run.path, error.strerror)

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._stream.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file, oldest first; a line cut off at the end is left out."""
    records = []
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
    except FileNotFoundError:
        pass
    return records


def _keep_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record.get("step", 0) <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def _open_tensorboard(directory: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    try:
        directory.mkdir(parents=True, exist_ok=True)
        # points after `step` come from an attempt that did not get them into a checkpoint
        return SummaryWriter(str(directory), purge_step=step + 1, flush_secs=30)
    except OSError as error:
        log.warning("%s: TensorBoard cannot be written (%s); metrics.jsonl goes on", directory, error.strerror)
        return None
