"""Which checkpoint a run goes on from, and when it may begin at step 0: never unasked where steps would be lost.

`mokd train --restart` and `mokd resume --restart` are the only way to begin anew. What there was is kept beside it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from data_pipeline.core.errors import UserError
from mokd.checkpointing import storage
from mokd.checkpointing.reading import Checkpoint, DamagedCheckpointError, read_checkpoint
from mokd.runs.files import replace_json, replace_text, sync_file
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)

# what a new beginning writes again; attempts and the scheduler's files go on
RESTARTED = (
    *("environment.json", "status.json", "metrics.jsonl", "tb", "checkpoints", "changes.jsonl", "failures", "eval"),
    *("alarms.jsonl", "loggers.json"),
    "config.yaml",  # last: without it the directory is no run
)


def newest(run: RunDirectory, *, aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning and passed over.

    aside: rename damaged ones out of the way, which only the attempt that trains may do. Errors as `read_checkpoint`.
    """
    for path in reversed(storage.step_directories(run)):
        try:
            return read_checkpoint(path)
        except DamagedCheckpointError as error:
            if aside:
                storage.set_aside(path, str(error))
            elif path.exists():  # else it was pruned just now
                log.warning("%s is damaged (%s); the checkpoint before it is used", path, error)
    return None


def to_resume_from(run: RunDirectory, every_steps: int | None, *, aside: bool = False) -> Checkpoint | None:
    """The checkpoint to go on from, None for a run that begins; UserError where a beginning would lose saved steps.

    every_steps: steps between saves, where known. Ended before its first save, a run begins again and says so.
    """
    found = newest(run, aside=aside)
    if found is not None:
        return found
    damaged = sorted(path.name for path in run.checkpoints.glob("*step-*") if not path.name.startswith("."))
    mark = run.read_status()
    saved = int(mark.get("checkpoint_step", 0))
    logged = max((int(record.get("step", 0)) for record in read_metrics(run.metrics_file)), default=0)
    if mark.get("state") in ("stopped", "done"):  # which both save
        saved = max(saved, int(mark.get("step", 0)))
    problem = None
    if damaged:
        problem = f"none of its checkpoints is whole ({', '.join(damaged)})"
    elif saved or (run.checkpoints / "latest").exists():
        problem = f"step {saved or mark.get('step', '?')} was saved and no checkpoint is there"
    elif every_steps is not None and logged > 2 * every_steps:
        problem = f"{logged} steps are in its metrics and no checkpoint is there"
    if problem:
        raise UserError(
            f"{run.path}: {problem}; bring a checkpoint back, or begin at step 0 with --restart, which keeps the old "
            "metrics and checkpoints aside"
        )
    if logged:
        log.warning("%s: ended before its first save; the %d steps in its metrics are trained again", run.path, logged)
    return None


def begin_search(run: RunDirectory, every_steps: int | None) -> Callable[[], Checkpoint | None]:
    """`to_resume_from`, with `aside`, in a thread, which what is returned waits for.

    Reading and hashing a checkpoint takes about as long as building its networks, and needs none of them.
    """
    found: Future[Checkpoint | None] = Future()

    def search() -> None:
        try:
            found.set_result(to_resume_from(run, every_steps, aside=True))
        except BaseException as error:
            found.set_exception(error)

    # daemon: a start that ends in an error does not wait for it
    threading.Thread(target=search, name="checkpoint search", daemon=True).start()
    return found.result


def restart(run: RunDirectory) -> Path:
    """Moves what a run has written aside, to `before-restart-<n>/` in it, to begin at step 0. Returns where."""
    aside = _aside(run, "before-restart")
    for name in RESTARTED:
        if (run.path / name).exists():
            os.rename(run.path / name, aside / name)
    sync_file(run.path)
    return aside


def at_step(run: RunDirectory, step: int) -> Checkpoint:
    """The checkpoint of a step; UserError where it is not there or not whole."""
    there = [storage.step_of(found) for found in storage.step_directories(run)]
    if step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise UserError(f"--from-step {step}: {run.path} has checkpoints of steps {steps}")
    path = storage.step_directory(run, step)
    try:
        return read_checkpoint(path)
    except DamagedCheckpointError as error:
        raise UserError(f"--from-step {step}: {path} is damaged ({error}); choose another step") from None


def rewind(run: RunDirectory, found: Checkpoint) -> None:
    """Makes a checkpoint the newest: later ones, and a copy of the metrics, go to `before-rewind-<n>/`."""
    aside = _aside(run, "before-rewind")
    for file in (run.metrics_file, run.alarms_file):
        if file.exists():
            shutil.copy2(file, aside / file.name)
    # other values follow: wandb and mlflow, which forget nothing, get a run of their own
    if run.loggers_file.exists():
        os.rename(run.loggers_file, aside / run.loggers_file.name)
    for later in storage.step_directories(run):
        if storage.step_of(later) > found.step:
            os.rename(later, aside / later.name)
    replace_text(run.checkpoints / "latest", found.path.name + "\n", durable=True)
    # it may have been done or failed: from now on it has come so far
    back = {"state": "stopped", "step": found.step, "checkpoint_step": found.step, "reason": "taken back by its user"}
    replace_json(run.path / "status.json", {**run.read_status(), **back}, durable=True)


def _aside(run: RunDirectory, name: str) -> Path:
    number = 1
    while (aside := run.path / f"{name}-{number}").exists():
        number += 1
    aside.mkdir(mode=0o700)
    return aside
