"""A first configuration for a person's images, begun from one of ours: data, batch and workers that fit."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from data_pipeline.beton.format import open_beton
from data_pipeline.beton.samples import open_samples
from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from launcher.first_steps.demo import NEIGHBOURS
from mokd.config import RunConfig

# pairs by name: the configuration that each begins with, and when it is the one to take
PAIRS = {
    "resnet50,vit_small": ("vit_s_resnet50.yaml", "the paper's first pair; GPUs"),
    "resnet50,vit_base": ("vit_b_resnet50.yaml", "the paper's largest; GPUs with much memory"),
    "resnet18,resnet50": ("resnet18_resnet50.yaml", "two ResNets; GPUs"),
    "vit_tiny,vit_small": ("vit_s_vit_tiny.yaml", "two transformers; GPUs"),
    "resnet18,vit_tiny": ("cifar10_resnet18_vit_tiny.yaml", "images of 32 to 64 pixels; one GPU"),
    "resnet10,vit_nano": ("cifar10_cpu.yaml", "images of 32 to 64 pixels; CPU cores"),
}
SMALL_PX = 64
LOOKED_AT = 50
# prototypes per image in the paper: 65,536 for 1.28 million; with fewer images a prototype would see too few
IMAGES_PER_PROTOTYPE = 20
FEWEST_PROTOTYPES = 256
ABOUT = {
    "data": "the images, as `mokd convert` wrote them; workers: decoding threads of each rank",
    "objective": "prototypes: about one per {per} images",
    "views": "what every image is cut into; look at it: mokd views {file}",
    "branches": "weight: lambda, of what a branch learns from the other; small for the one that learns faster",
    "optim": "global_batch: images per step over all ranks; rates are scaled by it",
    "evaluation": "k-NN while training; without labels or test images: every_epochs: null",
}


@dataclass(frozen=True)
class Machine:
    """Where it will train: GPUs, if any, and cores."""

    gpus: int
    cores: int

    @classmethod
    def here(cls) -> Machine:
        """This one, as this process may use it."""
        import torch  # seconds, which a mistake in what was given need not wait for

        return cls(torch.cuda.device_count(), len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Found:
    """What is known of the images."""

    size: int
    side_px: int  # shorter side, in the middle
    labelled: bool
    # of other than three channels: mean and deviation of the images that were looked at, between 0 and 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def look(train: Path, channels: int | None = None) -> Found:
    """Counts the images of a beton or folder and measures some. UserError when there are none.

    channels: of a folder, without it three; a beton knows its own.
    """
    known = open_beton(train).channels if train.is_file() else 3
    samples = open_samples(train, channels or known)
    some = [samples.pixels(i) for i in range(0, samples.size, max(1, samples.size // LOOKED_AT))]
    side = round(statistics.median(min(pixels.shape[:2]) for pixels in some))
    if samples.channels == 3:
        return Found(samples.size, side, samples.num_classes > 1)
    mean = np.mean([(pixels / 255).mean((0, 1)) for pixels in some], axis=0)
    square = np.mean([((pixels / 255) ** 2).mean((0, 1)) for pixels in some], axis=0)
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0.0)), 0.01)  # of a channel that is the same everywhere
    return Found(samples.size, side, samples.num_classes > 1, _rounded(mean), _rounded(std))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def fitting_pair(found: Found, machine: Machine) -> str:
    """The pair to propose."""
    if found.side_px <= SMALL_PX:
        return "resnet18,vit_tiny" if machine.gpus else "resnet10,vit_nano"
    return "resnet50,vit_small" if machine.gpus else "resnet10,vit_nano"


def configuration(
    name: str, pair: str, train: Path, test: Path | None, found: Found, machine: Machine, configs: Path, file: Path
) -> str:
    """The YAML text of a configuration for `pair` on these images, checked. UserError when the pair is unknown."""
    if pair not in PAIRS:
        raise UserError(f"pair {pair}: expected one of {'; '.join(PAIRS)}")
    raw = schema.read_yaml(configs / PAIRS[pair][0])
    ranks = max(1, machine.gpus)
    raw |= {"name": name, "data": {"train": str(train), "workers": max(1, machine.cores // ranks)}}
    if found.mean:
        _without_colours(raw, found)
    raw["objective"]["prototypes"] = min(raw["objective"]["prototypes"], _prototypes(found.size))
    raw["optim"]["global_batch"] = _batch(raw["optim"]["global_batch"], found.size, ranks)
    raw["evaluation"] = _evaluation(raw["evaluation"], train, test, found)
    schema.validate(RunConfig, raw, str(file))
    head = (
        f"# {pair.replace(',', ' + ')} on {found.size} images in {train}.\n"
        f"#\n# Begun from {PAIRS[pair][0]}, which says more. Every key and its default: mokd config {file}\n"
    )
    words = {"per": math.ceil(found.size / raw["objective"]["prototypes"]), "file": file}
    return head + "".join(_section(key, value, words) for key, value in raw.items())


def _without_colours(raw: dict[str, Any], found: Found) -> None:
    """What is of red, green and blue has no meaning for other channels."""
    raw["data"]["channels"] = len(found.mean)
    jitter = {**raw["views"].get("jitter", {}), "saturation": 0.0, "hue": 0.0}
    normalization = {"mean": list(found.mean), "std": list(found.std)}
    raw["views"] |= {"jitter": jitter, "grey_probability": 0.0, **normalization}


def _section(key: str, value: Any, words: dict[str, Any]) -> str:
    about = f"# {ABOUT[key].format(**words)}\n" if key in ABOUT else ""
    if not isinstance(value, dict | list):
        return about + yaml.safe_dump({key: value})
    # a line for each part, and each innermost mapping on one
    return f"{about}{key}:\n" + textwrap.indent(
        yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110), "  "
    )


def _prototypes(images: int) -> int:
    fitting = max(FEWEST_PROTOTYPES, images // IMAGES_PER_PROTOTYPE)
    return int(2 ** math.floor(math.log2(fitting)))


def _batch(usual: int, images: int, ranks: int) -> int:
    """As usual, or less where there are too few images for some steps an epoch; a multiple of the ranks."""
    batch = min(usual, int(2 ** math.floor(math.log2(max(2, images // 4)))))
    return max(batch // ranks, 2) * ranks


def _evaluation(usual: dict[str, Any], train: Path, test: Path | None, found: Found) -> dict[str, Any]:
    if test is None or not found.labelled:
        return {"every_epochs": None}
    kept = {key: value for key, value in usual.items() if key not in ("train", "test")}
    few = {"knn": {"k": [min(NEIGHBOURS, found.size)]}} if found.size < NEIGHBOURS else {}
    return {"train": str(train), "test": str(test), **kept, **few}


def test_images(train: Path) -> Path | None:
    """What lies beside the training images under a usual name for testing."""
    names: Sequence[str] = ("val", "test", "validation")
    found = (train.with_name(f"{name}{train.suffix}") for name in names)
    return next((path for path in found if path != train and path.exists()), None)
