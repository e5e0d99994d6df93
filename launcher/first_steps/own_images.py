"""A person's folder of images, split for training and testing by links; the images stay where they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.beton.sources import Listing, list_images
from data_pipeline.core.errors import UserError

EVERY = 5  # image of a class is for testing


def split(images: Path, output: Path) -> list[str]:
    """Makes `output`/train and, where there are at least two classes, `output`/test, anew. UserError as `list_images`.

    Returns the classes that are left out: those of a single image, which cannot be both learned from and tested.

    Links have the names of the images, below the class: what is said of a link is said of the image.
    """
    listing = list_images([images])
    kept = _parts(listing)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for index, part in kept:
        path, label = listing.paths[index], listing.labels[index]
        if not isinstance(path, Path):
            raise UserError(f"{images}: holds archives or tables; convert them (mokd convert), then mokd init")
        folder = Path(listing.classes[label]) if label >= 0 else Path()
        link = partial / part / folder / path.relative_to(images / folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    shutil.rmtree(output, ignore_errors=True)
    os.rename(partial, output)
    left = sorted(set(range(len(listing.classes))) - {listing.labels[index] for index, _ in kept})
    return [listing.classes[label] for label in left]


def _parts(listing: Listing) -> Sequence[tuple[int, str]]:
    """The image's index and "train" or "test", for all that are kept."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(listing.labels):
        members.setdefault(label, []).append(index)
    usable = {label: found for label, found in members.items() if label >= 0 and len(found) > 1}
    if len(usable) < 2:
        return [(index, "train") for index in range(len(listing.paths))]
    parts = []
    for found in usable.values():
        tested = set(found[EVERY - 1 :: EVERY]) or {found[-1]}
        parts += [(index, "test" if index in tested else "train") for index in found]
    return parts
