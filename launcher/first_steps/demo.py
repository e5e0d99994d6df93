"""The demo: images, betons, and what of configs/demo.yaml changes for a person's own images; made once."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.samples import open_samples
from data_pipeline.beton.synthetic import generate
from data_pipeline.core.errors import UserError
from launcher.first_steps.own_images import split

HOME = Path("data/demo")
BATCH, NEIGHBOURS = 64, 30  # of configs/demo.yaml, and the most that an evaluation looks at by default
MAX_RESOLUTION = 160

Say = Callable[[str], None]


def prepare(images: Path | None, ranks: int, say: Say) -> Sequence[str]:
    """Makes the betons below `data/` of this folder, from drawn images or a person's own, where they are missing.

    Returns the overrides of configs/demo.yaml that go with own images. say: told what is being done. UserError.
    """
    if images is None:
        if not (HOME / "images").is_dir():
            say("drawing images")
            _draw(HOME / "images")
        _convert(HOME, say)
        return []
    images = images.resolve()
    # a name of its own for every folder of images, so that another one starts another run
    folder = re.sub(r"[^A-Za-z0-9]+", "-", images.name).strip("-")
    name = f"demo-{folder}-{hashlib.sha1(str(images).encode()).hexdigest()[:6]}"
    home = HOME.with_name(name)
    if not (home / "images").is_dir():
        for left in split(images, home / "images"):
            say(f"{images / left}: left out, a class of a single image")
    _convert(home, say)
    return [f"name={name}", *_overrides(home, images, ranks)]


def _draw(folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    generate(partial)
    os.rename(partial, folder)


def _convert(home: Path, say: Say) -> None:
    for folder in sorted((home / "images").iterdir(), reverse=True):
        output = home / f"{folder.name}.beton"
        if not output.exists():
            say(f"converting {folder} to {output}")
            for skipped in convert([folder], output, ConvertOptions(max_resolution=MAX_RESOLUTION)).skipped:
                say(f"skipped {Path(skipped.path).resolve()}: {skipped.reason}")


def _overrides(home: Path, images: Path, ranks: int) -> list[str]:
    train, test = home / "train.beton", home / "test.beton"
    found = [f"data.train={train}"]
    if test.exists():
        found += [f"evaluation.train={train}", f"evaluation.test={test}"]
    else:
        found += ["evaluation.every_epochs=null", "evaluation.train=null", "evaluation.test=null"]
    size = open_samples(train).size
    if size < BATCH:
        batch = min(size, BATCH) // ranks * ranks
        if batch < 2 * ranks:
            raise UserError(f"{images}: {size} images; the demo needs at least {2 * ranks} on {ranks} ranks")
        found.append(f"optim.global_batch={batch}")
    if size < NEIGHBOURS and test.exists():
        found.append(f"evaluation.knn.k=[{size}]")
    return found
