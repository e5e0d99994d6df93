"""Small file systems, for what happens when they are full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_file_system(folder: Path, options: str) -> Generator[Path]:
    """A tmpfs with mount options like "size=64k,nr_inodes=16" at the new `folder`; skips where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        yield folder
    finally:
        # lazily: a daemon's job may still be closing its log there
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, what: str, left: int) -> list[Path]:
    """Uses up its "inodes", or its "room", but for so many inodes or pages; returns the files that do so."""
    room = os.statvfs(folder)
    if what == "inodes":
        files = [folder / f"filler-{index}" for index in range(room.f_ffree - left)]
        for file in files:
            file.touch()
        return files
    (folder / "filler").write_bytes(bytes(max(0, room.f_bavail - left) * room.f_bsize))
    return [folder / "filler"]
