"""What a data set is made from: folders of images, webdataset archives, tables of Hugging Face, lists of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.beton.archives import images_in_archive
from data_pipeline.beton.folders import SUFFIXES, images_below, visible
from data_pipeline.beton.lists import images_listed
from data_pipeline.beton.places import Found, Place
from data_pipeline.beton.tables import Columns, images_in_table, tables_saved_to_disk
from data_pipeline.core.errors import UserError
from data_pipeline.sampling.order import class_subset

# names of folders and files that hold parts of a data set rather than classes
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
LISTS, TABLES, ARCHIVES = (".csv", ".tsv", ".txt"), (".parquet", ".arrow"), (".tar",)


@dataclass(frozen=True)
class Listing:
    """The images of a data set, in order: where they are, labels (-1: none), class names by label."""

    paths: tuple[Place, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """What one source holds. names: its classes by number, where it says so."""

    found: Found
    names: tuple[str, ...] | None = None
    is_folder: bool = False


def list_images(
    sources: Sequence[Path],
    subset: float | None = None,
    seed: int = 0,
    *,
    channels: int = 3,
    columns: Columns | None = None,
) -> Listing:
    """The images of the sources. Raises UserError when there are none, or a source cannot be read.

    Of a folder, the sub-folders at the top are the classes, and without any it has no labels; hidden files are left
    out, symbolic links followed, but not in circles. Archives (`.tar`), tables (`.parquet`, `.arrow`) and lists
    (`.csv`, `.tsv`, `.txt`) say the class of each image, and keep their order; a folder of nothing but archives or
    tables stands for them. Classes of the same name in several sources are one class. `subset` keeps that part of each
    class (at least one image), chosen by `seed`. channels: arrays (`.npy`) are images too when it is not 3.
    """
    parts = [part for source in sources for part in _parts(source, channels, columns or Columns())]
    found = [item for part in parts for item in part.found]
    names = _class_names(parts)
    label = {name: i for i, name in enumerate(names)}
    if all(part.is_folder for part in parts):
        found.sort(key=lambda item: -1 if item[0] is None else label[item[0]])  # stable: sources stay in order
    if subset is not None:
        found = _subset(found, label, subset, seed)
    paths = tuple(path for _, path in found)
    return Listing(paths, tuple(-1 if name is None else label[name] for name, _ in found), names)


def _parts(source: Path, channels: int, columns: Columns) -> list[_Part]:
    if not source.exists():
        raise UserError(f"{source}: no such folder or file")
    suffixes = SUFFIXES if channels == 3 else SUFFIXES | {".npy"}
    if source.is_dir():
        if files := tables_saved_to_disk(source):
            return [_Part(*images_in_table(file, columns)) for file in files]
        if found := images_below(source, suffixes):
            return [_Part(found, is_folder=True)]
        return [part for file in _packed_in(source, suffixes) for part in _parts(file, channels, columns)]
    kind = source.suffix.lower()
    if kind in LISTS:
        part = _Part(images_listed(source))
    elif kind in TABLES:
        part = _Part(*images_in_table(source, columns))
    elif kind in ARCHIVES:
        part = _Part(images_in_archive(source, suffixes))
    elif source.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise UserError(f"{source}: is compressed; decompress it to a plain .tar first (images gain nothing from it)")
    else:
        kinds = ", ".join((*ARCHIVES, *TABLES, *LISTS))
        raise UserError(f"{source}: not a folder, and not one of {kinds}; give the folder that holds the images")
    if not part.found:
        raise UserError(f"{source}: no images in it")
    return [part]


def _packed_in(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """The archives or tables of a folder without images. UserError when there are none, or of more than one split."""
    files = sorted(p for p in visible(folder) if p.suffix.lower() in ARCHIVES + TABLES and not p.is_dir())
    if not files:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(sorted(suffixes))})")
    splits = sorted({start for file in files if (start := file.stem.lower().partition("-")[0]) in SPLITS})
    if len(splits) > 1:
        raise UserError(f"{folder}: holds files of several parts ({', '.join(splits)}); give the files of one of them")
    return files


def _class_names(parts: Sequence[_Part]) -> tuple[str, ...]:
    """Class names by label: as all sources number them, else in the order of the alphabet, or of numbers."""
    declared = {part.names for part in parts}
    if len(declared) == 1 and (names := declared.pop()) is not None:
        return names
    found = {name for part in parts for name, _ in part.found if name is not None}
    in_numbers = all(name.isdecimal() for name in found) and not any(part.is_folder for part in parts)
    return tuple(sorted(found, key=int) if in_numbers else sorted(found))


def _subset(found: Found, number: dict[str, int], part: float, seed: int) -> Found:
    if not 0.0 < part <= 1.0:
        raise UserError(f"subset {part}: expected a part of each class, above 0 and at most 1")
    labels = np.asarray([-1 if name is None else number[name] for name, _ in found], np.int64)
    return [found[i] for i in class_subset(labels, part, seed)]
