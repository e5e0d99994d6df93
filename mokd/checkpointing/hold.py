"""A checkpoint of a live run, held while somebody reads it: hard links beside it, which pruning does not reach."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.core.errors import UserError
from mokd.checkpointing import storage
from mokd.checkpointing.reading import Checkpoint, DamagedCheckpointError, read_checkpoint
from mokd.runs.files import read_json
from mokd.runs.run_directory import RunDirectory

# a holder that was killed leaves its links; so old ones are taken for such
FORGOTTEN_SECONDS = 7 * 24 * 3600.0


@contextmanager
def newest_held(run: RunDirectory, step: int | None = None) -> Generator[Checkpoint]:
    """The newest whole checkpoint, or that of a step, verified in the place where it is held until the end of the
    context.

    UserError where there is none. What is unreadable or of a newer format is told as by `read_checkpoint`.
    """
    _forget(run)
    place = run.evaluations / f".held-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
    try:
        yield _hold_newest(run, place, step)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _hold_newest(run: RunDirectory, place: Path, step: int | None) -> Checkpoint:
    tried: set[int] = set()
    while True:
        # listed again every time: what was pruned meanwhile has a newer one
        there = {storage.step_of(path): path for path in storage.step_directories(run)}
        left = [path for at, path in there.items() if at not in tried and step in (None, at)]
        if not left and step is not None:
            steps = ", ".join(map(str, there)) or "none"
            raise UserError(f"{run.path}: has no whole checkpoint of step {step}; there are those of steps {steps}")
        if not left:
            raise UserError(f"{run.path}: has no complete checkpoint yet")
        held = place / left[-1].name
        try:
            held.mkdir(parents=True, mode=0o700)
            for file in left[-1].iterdir():
                os.link(file, held / file.name)
            return read_checkpoint(held)
        except (FileNotFoundError, DamagedCheckpointError):
            shutil.rmtree(held, ignore_errors=True)
            if left[-1].exists():  # damaged, not pruned
                tried.add(storage.step_of(left[-1]))


def open_held(path: Path) -> Checkpoint:
    """A checkpoint that another process of the same evaluation has verified and holds."""
    state = read_json(path / "state.json")
    if state is None:
        raise UserError(f"{path}: no checkpoint is held there any more")
    return Checkpoint(path, int(state["step"]), state)


def _forget(run: RunDirectory) -> None:
    for path in run.evaluations.glob(".held-*"):
        try:
            if time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # gone meanwhile
