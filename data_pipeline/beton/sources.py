"""Image folders: which files belong to a data set, in which order, and what their labels are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from data_pipeline.beton.images import SUFFIXES
from data_pipeline.core.errors import UserError
from data_pipeline.sampling.order import class_subset


@dataclass(frozen=True)
class Listing:
    """The images of a data set, in order: paths as given, labels (-1: none), class names by label."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def list_images(sources: Sequence[Path], subset: float | None = None, seed: int = 0) -> Listing:
    """The images below the folders. Sub-folders at the top are the classes; a folder without any has no labels.

    Classes of the same name in several sources are one class. Hidden files are left out, symbolic links followed, but
    not in circles. `subset` keeps that part of each class (at least one image), chosen by `seed`. UserError when there
    are none, or a folder cannot be read.
    """
    found: list[tuple[str | None, Path]] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such folder")
        if not source.is_dir():
            raise UserError(f"{source}: not a folder; give the folder that holds the images")
        before = len(found)
        classes = sorted((p for p in _visible(source) if p.is_dir()), key=lambda p: p.name)
        found += [(folder.name, path) for folder in classes for path in _walk(folder)]
        found += [(None, path) for path in sorted(p for p in _visible(source) if _is_image(p))]
        if len(found) == before:
            raise UserError(f"{source}: no images in it (looked for {', '.join(sorted(SUFFIXES))})")
    names = sorted({name for name, _ in found if name is not None})
    label = {name: i for i, name in enumerate(names)}
    found.sort(key=lambda item: -1 if item[0] is None else label[item[0]])  # stable: sources stay in order
    if subset is not None:
        found = _subset(found, label, subset, seed)
    paths = tuple(path for _, path in found)
    return Listing(paths, tuple(-1 if name is None else label[name] for name, _ in found), tuple(names))


def _visible(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            yield from (Path(entry.path) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _walk(folder: Path) -> Iterator[Path]:
    above = {str(folder): {_identity(folder)}}  # of every folder: itself and those it lies in, links resolved
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        own = above.pop(root)
        inside = {name: _identity(Path(root, name)) for name in folders if not name.startswith(".")}
        folders[:] = sorted(name for name, identity in inside.items() if identity not in own)
        above |= {os.path.join(root, name): own | {inside[name]} for name in folders}
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError as error:
        _refuse(error)
    return found.st_dev, found.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}; its images would be missing") from None


def _subset(
    found: list[tuple[str | None, Path]], number: dict[str, int], part: float, seed: int
) -> list[tuple[str | None, Path]]:
    if not 0.0 < part <= 1.0:
        raise UserError(f"subset {part}: expected a part of each class, above 0 and at most 1")
    labels = np.asarray([-1 if name is None else number[name] for name, _ in found], np.int64)
    return [found[i] for i in class_subset(labels, part, seed)]
