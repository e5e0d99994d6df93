"""Checkpoints: everything of a run's state, published whole or not at all, verified when read.

`checkpoints/step-<n>/` holds one safetensors file per branch and one for the objective (no pickles), `state.json` with
the scalars, and `checksums.json`, which is written last. The directory is filled beside its place, made durable and
renamed; `latest` names the newest. A random state is not in it because none is carried from step to step: what is drawn
is a function of (seed, step, branch).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mokd.checkpointing.crash_points import crash_point
from mokd.runs.files import file_checksum, read_json, replace_text, sync_file
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)

FORMAT = 1
CHECKSUMS = "checksums.json"

Snapshot = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        return read_json(self.path / CHECKSUMS) or {}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, `name` without suffix, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    @contextmanager
    def open(self, name: str) -> Generator[SavedTensors]:
        """One file, to be read tensor by tensor."""
        with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
            yield SavedTensors(file, list(file.keys()))


@dataclass(frozen=True)
class SavedTensors:
    """The tensors of an open file whose names begin with `prefix`, named without it."""

    file: Any
    names: Sequence[str]
    prefix: str = ""

    def below(self, prefix: str) -> SavedTensors:
        """Those whose names begin with `prefix`."""
        return SavedTensors(self.file, [n for n in self.names if n.startswith(prefix)], prefix)

    def keys(self) -> list[str]:
        """Their names."""
        return [name.removeprefix(self.prefix) for name in self.names]

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it: nothing else is read from the disk."""
        if rows is None:
            return self.file.get_tensor(self.prefix + key)
        part = self.file.get_slice(self.prefix + key)
        return part[rows.start : rows.stop] if part.get_shape() else self.file.get_tensor(self.prefix + key)


def step_directory(run: RunDirectory, step: int) -> Path:
    """Where the checkpoint of `step` is published."""
    return run.checkpoints / f"step-{step}"


def publish(run: RunDirectory, attempt: int, step: int, snapshot: Snapshot, state: dict[str, Any]) -> bool:
    """Writes a checkpoint and publishes it by rename; False, with a warning, where the disk is full.

    Refused with StaleAttemptError when a newer attempt has taken over the run.
    """
    run.check_attempt(attempt)
    target = step_directory(run, step)
    if target.exists():
        if read_checkpoint(target) is not None:
            return True  # the same step saved twice, for an interval and for a stop
        shutil.rmtree(target)
    clear_leftovers(run)
    beside = run.checkpoints / f".step-{step}.{attempt}.partial"
    try:
        beside.mkdir(parents=True)
        crash_point("created")
        checksums = {}
        for name, tensors in snapshot.items():
            file = beside / f"{name}.safetensors"
            save_file(dict(tensors), file)
            sync_file(file)
            checksums[file.name] = file_checksum(file)
            crash_point(f"wrote {name}")
        document = json.dumps({"format": FORMAT, "step": step, "attempt": attempt, **state}, indent=1)
        replace_text(beside / "state.json", document, durable=True)
        checksums["state.json"] = file_checksum(beside / "state.json")
        replace_text(beside / CHECKSUMS, json.dumps(checksums, indent=1), durable=True)
        crash_point("complete")
        run.check_attempt(attempt)  # as late as can be: a leftover must not publish
        os.rename(beside, target)
        sync_file(run.checkpoints)
        crash_point("renamed")
        replace_text(run.checkpoints / "latest", target.name + "\n", durable=True)
        crash_point("latest")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, SafetensorError) and "space" not in str(error) and "quota" not in str(error):
            raise
        log.error("DISK FULL: %s could not be saved; training goes on, the previous checkpoint stays", target)
        return False
    return True


def prune(run: RunDirectory, keep_last: int, keep_every: int | None) -> None:
    """Removes old complete checkpoints, never the newest `keep_last` and those divisible by `keep_every`."""
    found = sorted(_step_directories(run), key=_step_of)
    for path in found[:-keep_last]:
        if keep_every and _step_of(path) % keep_every == 0:
            continue
        # out of sight first: a directory that is half removed must not look like a checkpoint
        hidden = path.with_name(f".{path.name}.removed")
        os.rename(path, hidden)
        crash_point("prune")
        shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(run: RunDirectory) -> None:
    """Removes what a save or a removal that was cut off has left behind."""
    for path in run.checkpoints.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def newest(run: RunDirectory) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named in a warning and passed over."""
    for path in sorted(_step_directories(run), key=_step_of, reverse=True):
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            return checkpoint
        log.warning("%s is damaged; the checkpoint before it is used", path)
    return None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """A checkpoint whose every file matches its checksum; None when anything is missing or changed."""
    checksums = read_json(path / CHECKSUMS)
    if not isinstance(checksums, dict) or not checksums:
        return None
    try:
        if any(file_checksum(path / name) != value for name, value in checksums.items()):
            return None
    except OSError:
        return None
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return None
    return Checkpoint(path, int(state["step"]), state)


def _step_directories(run: RunDirectory) -> list[Path]:
    return [path for path in run.checkpoints.glob("step-*") if path.name[5:].isdigit()]


def _step_of(path: Path) -> int:
    return int(path.name[5:])
