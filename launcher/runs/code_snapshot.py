"""A copy of the code beside the run: editing the checkout changes nothing for a queued or requeued job."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import data_pipeline
import launcher
import mokd
from data_pipeline.core.errors import UserError

PACKAGES = (launcher, mokd, data_pipeline)
CARRIED = "mokd.libs"


def take(target: Path) -> str:
    """Copies the running code to `target`, replacing what is there, and returns its digest."""
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        for package in PACKAGES:
            assert package.__file__ is not None
            source = Path(package.__file__).parent
            if source.parent == target.absolute():
                return digest(target)  # this very process runs from the snapshot
            shutil.copytree(source, beside / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            # an installed wheel has what the compiled part needs beside it
            if (carried := source.parent / CARRIED).is_dir():
                shutil.copytree(carried, beside / CARRIED, dirs_exist_ok=True)
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
        if target.exists():
            os.rename(target, old)
        os.rename(beside, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target}: the code cannot be copied there: {error.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return digest(target)


def digest(folder: Path) -> str:
    """A hash over the names and contents of all files below `folder`."""
    result = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            result.update(f"{path.relative_to(folder)}\0".encode())
            result.update(hashlib.sha256(path.read_bytes()).digest())
    return result.hexdigest()[:16]
