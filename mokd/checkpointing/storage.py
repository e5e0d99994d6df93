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
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mokd.checkpointing.crash_points import crash_point
from mokd.checkpointing.reading import CHECKSUMS, FORMAT, STATE, DamagedCheckpointError, read_checkpoint
from mokd.runs.files import file_checksum, replace_text, sync_file
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)

Snapshot = Mapping[str, Mapping[str, Tensor]]


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
        try:
            read_checkpoint(target)
            return True  # the same step saved twice, for an interval and for a stop
        except DamagedCheckpointError as error:
            set_aside(target, str(error))
    for leftover in run.checkpoints.glob(".step-*"):  # of a save or a removal that was cut off
        shutil.rmtree(leftover, ignore_errors=True)
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
        replace_text(beside / STATE, document, durable=True)
        checksums[STATE] = file_checksum(beside / STATE)
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


def prune(run: RunDirectory, published: int, keep_last: int, keep_every: int | None) -> None:
    """Removes checkpoints from before the step that has just been published and verified: not the `keep_last` newest
    with that one, and never those divisible by `keep_every`.
    """
    found = [path for path in step_directories(run) if step_of(path) <= published]
    for path in found[:-keep_last]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        # out of sight first: a directory that is half removed must not look like a checkpoint
        hidden = path.with_name(f".{path.name}.removed")
        os.rename(path, hidden)
        crash_point("prune")
        shutil.rmtree(hidden, ignore_errors=True)


def set_aside(path: Path, reason: str) -> Path:
    """Renames a damaged checkpoint, with the reason in its name: no checkpoint any more, and nothing removes it."""
    told = re.sub(r"[^A-Za-z0-9._]+", "-", reason)[:100]
    names = (f"damaged-{path.name}--{told}{suffix}" for suffix in ("", *(f".{i}" for i in range(2, 1000))))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    os.rename(path, target)
    sync_file(path.parent)
    log.warning("%s is damaged (%s); set aside as %s", path, reason, target.name)
    return target


def step_directories(run: RunDirectory) -> list[Path]:
    """What is published, whole or damaged, oldest step first."""
    return sorted((path for path in run.checkpoints.glob("step-*") if path.name[5:].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a directory `step-<n>`."""
    return int(path.name[5:])
