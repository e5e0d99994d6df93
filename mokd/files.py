"""Durable, all-or-nothing writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync_file(path: Path) -> None:
    """Forces a file's, or a directory's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Puts `text` in place of the file `path` by rename: a reader sees the old or the new content, never a mixture."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync_file(path.parent)


def replace_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Puts `value` as JSON in place of the file `path`, by rename."""
    replace_text(path, json.dumps(value, indent=1) + "\n", durable=durable)


def read_json(path: Path) -> Any | None:
    """The JSON value in a file; None when the file is missing or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
