"""Directories that only their owner can change: submitit's files are pickles, which whoever loads them executes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipeline.core.errors import UserError


def make_private(path: Path) -> None:
    """Creates `path` for its owner only; UserError when it exists and others may write to it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be created: {error.strerror}") from None
    require_private(path)


def require_private(path: Path) -> None:
    """UserError unless `path` belongs to this user and nobody else can write to it."""
    facts = path.stat()
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{path}: writable by others, who could make your jobs run their code; run: chmod go-w '{path}'"
        )
    if facts.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{path}: belongs to another user, who could make your jobs run their code")
