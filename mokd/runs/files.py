"""Durable, all-or-nothing writes."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
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
    replace_bytes(path, text.encode(), durable=durable)


def replace_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Puts `content` in place of the file `path` by rename, as `replace_text`."""
    # of this thread alone, on whichever node: the directory may be shared
    owner = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    beside = path.with_name(f".{path.name}.{owner}.partial")
    try:
        with open(beside, "wb") as stream:
            stream.write(content)
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


def checksum(content: bytes) -> str:
    """SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
