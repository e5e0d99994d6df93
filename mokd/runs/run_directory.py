"""The directory of a run: where everything lies, which attempt may write, and what state the run is in."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.config import RunConfig, load_config
from mokd.runs.files import create_json, read_json, replace_json, replace_text

State = Literal["starting", "running", "stopped", "done", "failed"]

# what a new mark keeps of the one before
_KEPT_FACTS = ("step", "total_steps", "checkpoint_step", "epoch")


class StaleAttemptError(RuntimeError):
    """A newer attempt at the same run has started; this one must write nothing more."""


class RunDirectory:
    """Paths and marks of one run. Nothing here needs torch, so status commands stay quick."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # the resolved configuration
        self.config_file = path / "config.yaml"
        # versions, commit and command of the newest attempt
        self.environment_file = path / "environment.json"
        # one JSON object per logged step or evaluation
        self.metrics_file = path / "metrics.jsonl"
        # TensorBoard's event files
        self.tensorboard = path / "tb"
        # what wandb and mlflow call this run
        self.loggers_file = path / "loggers.json"
        # published checkpoints, `step-<n>`, and `latest`, which names the newest
        self.checkpoints = path / "checkpoints"
        # the scheduler's files
        self.jobs = path / "jobs"
        # results of `mokd eval`
        self.evaluations = path / "eval"
        # first weights that came from elsewhere, `<branch>.safetensors`, and where from, `<branch>.json`
        self.initial_weights = path / "init"
        # what was known when a loss was not finite, `step-<n>/`
        self.failures = path / "failures"
        # hyper-parameters changed on the way: lines of JSON with `time`, `step`, `key`, `before`, `after`
        self.changes_file = path / "changes.jsonl"
        # what monitors warned of: lines of JSON with `time`, `step`, `alarm`, `advice`
        self.alarms_file = path / "alarms.jsonl"
        # what every rank is doing, `rank-<r>.json`
        self.heartbeats = path / "heartbeat"
        self._attempts = path / "attempts"

    def attempt_file(self, attempt: int) -> Path:
        """Who made an attempt, since when."""
        return self._attempts / f"{attempt:04d}.json"

    def phases_file(self, attempt: int) -> Path:
        """When an attempt began which phase: lines of JSON with `time`, `phase`, `step`, and `part` of one."""
        return self._attempts / f"{attempt:04d}" / "phases.jsonl"

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """A new, private run directory holding `config`; UserError when it exists already or cannot be written."""
        run = cls(path)
        if run.config_file.exists():
            raise UserError(f"{path}: this run exists already; continue it with --resume, or choose another name")
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            run.checkpoints.mkdir(exist_ok=True)
            replace_text(run.config_file, schema.dump_yaml(config), durable=True)
        except OSError as error:
            raise UserError(f"{path}: the run directory cannot be written: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run directory; UserError when it is none."""
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path}: not a run directory (it has no config.yaml)")
        return run

    def config(self) -> RunConfig:
        """The run's resolved configuration."""
        return load_config(self.config_file)

    def claim_attempt(self, facts: dict[str, Any] | None = None) -> int:
        """Registers a new attempt at the run and returns its number, one more than the newest.

        The highest number is the fence: whoever holds a lower one is a leftover and is refused.
        """
        self._attempts.mkdir(exist_ok=True)
        record = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **(facts or {})}
        while True:
            number = self.current_attempt() + 1
            try:
                create_json(self.attempt_file(number), record)
            except FileExistsError:
                continue  # somebody else took the number
            return number

    def current_attempt(self) -> int:
        """The newest attempt's number, 0 before the first."""
        try:
            return max((int(p.stem) for p in self._attempts.glob("[0-9]*.json")), default=0)
        except OSError:
            return 0

    def check_attempt(self, attempt: int) -> None:
        """StaleAttemptError unless `attempt` is the newest."""
        newest = self.current_attempt()
        if newest != attempt:
            raise StaleAttemptError(f"{self.path}: attempt {attempt} is a leftover, attempt {newest} has taken over")

    def write_status(self, state: State, attempt: int, **facts: Any) -> None:
        """Replaces `status.json`, keeping how far the run had come unless `facts` say. Refused to leftovers."""
        self.check_attempt(attempt)
        kept = {key: value for key, value in self.read_status().items() if key in _KEPT_FACTS}
        record = {**kept, "state": state, "attempt": attempt, "time": time.time(), **facts}
        replace_json(self.path / "status.json", record, durable=state in ("stopped", "done", "failed"))

    def write_failure(self, attempt: int, error: Exception, rank: int) -> None:
        """Marks the attempt as failed by `error`, unless a rank has failed before this one: then by that one's error.

        A file of its own, which the first to fail creates: the first rank may at that moment write a step's status.
        """
        file = self._failure_file(attempt)
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            create_json(file, {"reason": f"{type(error).__name__}: {error}", "rank": rank})
        self.write_status("failed", attempt, **(read_json(file) or {}))

    def _failure_file(self, attempt: int) -> Path:
        return self._attempts / f"{attempt:04d}" / "failure.json"

    def read_status(self) -> dict[str, Any]:
        """The newest status, empty before the first. A failure outweighs what another rank still wrote as it ran."""
        status = read_json(self.path / "status.json") or {}
        if status.get("state") in ("starting", "running"):
            failure = read_json(self._failure_file(status["attempt"]))
            return {**status, "state": "failed", **failure} if failure else status
        return status
