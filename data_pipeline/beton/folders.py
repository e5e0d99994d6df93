"""Folders of images: which files belong to a data set, and in which class each lies."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NoReturn

from data_pipeline.beton.places import Found
from data_pipeline.core.errors import UserError

# files of these names are tried; what Pillow cannot read here (HEIC without its plugin) is named among the skipped
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".avif", ".heic", ".heif", ".jp2", ".jxl"}
)


def images_below(folder: Path, suffixes: Set[str] = SUFFIXES) -> Found:
    """The images of a folder, those of its sub-folders with these as their classes. UserError when it is unreadable."""
    classes = sorted((p for p in visible(folder) if p.is_dir()), key=lambda p: p.name)
    found: Found = [(inner.name, path) for inner in classes for path in _walk(inner, suffixes)]
    direct = sorted(p for p in visible(folder) if p.suffix.lower() in suffixes and not p.is_dir())
    return found + [(None, path) for path in direct]


def visible(folder: Path) -> Iterator[Path]:
    """What lies in a folder and is not hidden. UserError when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            yield from (Path(entry.path) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _walk(folder: Path, suffixes: Set[str]) -> Iterator[Path]:
    above = {str(folder): {_identity(folder)}}  # of every folder: itself and those it lies in, links resolved
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        own = above.pop(root)
        inside = {name: _identity(Path(root, name)) for name in folders if not name.startswith(".")}
        folders[:] = sorted(name for name, identity in inside.items() if identity not in own)
        above |= {os.path.join(root, name): own | {inside[name]} for name in folders}
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(root, name)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        _refuse(error)
    return found.st_dev, found.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}; its images would be missing") from None
