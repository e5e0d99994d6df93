"""Splits a folder of images into `train` and `test` folders of links: every fifth image of a class is for testing.

usage: python tools/split_images.py IMAGES OUTPUT; prints `labelled`, or `unlabelled` where there are no class folders
(then everything is for training).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_pipeline.beton.sources import list_images
from data_pipeline.core.errors import UserError


def split(images: Path, output: Path) -> str:
    """Makes the links and says whether the images have labels."""
    listing = list_images([images])
    labelled = len(listing.classes) > 1
    seen: dict[int, int] = {}
    for number, (path, label) in enumerate(zip(listing.paths, listing.labels, strict=True)):
        seen[label] = seen.get(label, 0) + 1
        part = "test" if labelled and seen[label] % 5 == 0 else "train"
        folder = output / part / (listing.classes[label] if labelled else "")
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"{number:07d}{path.suffix}"
        if not link.is_symlink():
            os.symlink(path.resolve(), link)
    return "labelled" if labelled else "unlabelled"


if __name__ == "__main__":
    try:
        print(split(Path(sys.argv[1]), Path(sys.argv[2])))
    except UserError as error:
        sys.exit(f"error: {error}")
