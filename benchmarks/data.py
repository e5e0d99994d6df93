"""The data benchmark: loaders and converters on the same images, alternating, with medians and spread.

`mokd bench data --images FOLDER` runs it. Contenders have to make the same views before any clock runs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import data_contenders as contenders
from benchmarks import data_conversion as conversion
from benchmarks import data_footprint as footprint
from benchmarks.machine import describe
from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.core.errors import DataError, UserError

Say = Callable[[str], None]

MIN_IMAGES = 1000  # of a folder with fewer, copies are used too
VIEW_PX = 224  # of the largest views
_PACKAGES = ("torch", "torchvision", "pillow", "numpy", "ffcv", "numba")

# mean difference of a view in grey levels between our resampling or colours and Pillow's: any view, and all of them
_CROPS_TOLERANCE, _FULL_TOLERANCE = (3.0, 1.0), (6.0, 2.0)


@dataclass(frozen=True)
class Effort:
    """seconds: per measurement. rounds: of all contenders in turn. conversions: of both converters in turn."""

    seconds: float = 4.0
    rounds: int = 3
    conversions: int = 3


QUICK = Effort(seconds=1.0, rounds=1, conversions=1)


def run(images: Path, effort: Effort, say: Say) -> dict[str, Any]:
    """Everything, on the images of a folder. DataError when contenders do different work."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="mokd-bench-", dir=_scratch()) as folder:
        source = _repeated(images, Path(folder) / "images", MIN_IMAGES)
        small, original = Path(folder) / "400.beton", Path(folder) / "original.beton"
        say("converting")
        convert([source], small, ConvertOptions(mode="jpg", max_resolution=400, quality=90))
        convert([source], original, ConvertOptions())
        say("checking that contenders do the same work")
        same_work(small, cores)
        same_work(original, cores)
        workers = _best_workers(small, cores, effort.seconds / 2, say)
        rates = _rates({"400": small, "original": original}, cores, workers, effort, say)
        floors = [_floor(small, cores) for _ in range(effort.rounds)]
        converted = _conversions(source, effort, say)
        say("memory, latency, growth")
        prints = {
            "memory_mb": footprint.memory(small),
            "memory_mb_1281167_samples": footprint.memory(footprint.tiny_beton(Path(folder) / "tiny.beton")),
            "first_batch_seconds": footprint.first_batch_seconds(small),
            "growth": footprint.growth(small),
        }
    median = {name: statistics.median(values) for name, values in (rates | converted).items()}
    floor = statistics.median(seconds for seconds, _ in floors)
    return {
        "images_per_second": median,
        "ratios": _ratios(median, floor),
        "spread": {name: [min(values), max(values)] for name, values in (rates | converted).items()},
        "floor": {"ms_per_image": floor * 1e3, **floors[0][1]},
        "views": "2 x 224 + 8 x 96",
        "images": {"folder": images.name, "files": MIN_IMAGES, "batch": contenders.BATCH},
        "reference_workers": workers,
        **prints,
        "machine": describe(_PACKAGES, ["data_pipeline"]),
    }


def _ratios(median: dict[str, float], floor: float) -> dict[str, float]:
    """`crops_only_*` are against the whole reference loader, which has no GPU to leave its photometrics to;
    `*_same_work` against a reference that makes crops alone."""
    return {
        "crops_only_400": median["ours_crops_400"] / median["reference_full_400"],
        "crops_only_original": median["ours_crops_original"] / median["reference_full_original"],
        "full_cpu_400": median["ours_full_400"] / median["reference_full_400"],
        "full_cpu_original": median["ours_full_original"] / median["reference_full_original"],
        "over_floor": 1.0 / median["ours_crops_400"] / floor,
        "convert_original": median["convert_original"] / median["convert_ffcv_writer"],
        "crops_only_400_same_work": median["ours_crops_400"] / median["reference_crops_400"],
        "crops_only_original_same_work": median["ours_crops_original"] / median["reference_crops_original"],
    }


def same_work(beton: Path, workers: int) -> None:
    """Raises DataError unless ours and the reference's views of the same samples agree within the tolerance."""
    plain = contenders.PLAIN
    pairs = {
        "crops": (contenders.ours_crops(beton, workers), contenders.reference_crops(beton, workers), _CROPS_TOLERANCE),
        "all": (
            contenders.ours_full(beton, workers, plain),
            contenders.reference_full(beton, workers, plain),
            _FULL_TOLERANCE,
        ),
    }
    for name, (ours, reference, tolerance) in pairs.items():
        check_same(name, contenders.first_batch(ours), contenders.first_batch(reference), tolerance)


def check_same(name: str, ours: contenders.Views, theirs: contenders.Views, tolerance: tuple[float, float]) -> None:
    """Raises DataError unless every view differs by less than tolerance[0], all together by less than tolerance[1]."""
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise DataError(
                f"benchmark: {name}: shapes differ: {tuple(a.shape)} and {tuple(b.shape)}; not the same work"
            )
        differences += ((a - b).abs().mean(dim=(-3, -2, -1)) * 255).flatten().tolist()
    worst, mean = max(differences), statistics.fmean(differences)
    if worst > tolerance[0] or mean > tolerance[1]:
        raise DataError(
            f"benchmark: {name}: views differ by {mean:.2f} grey levels, one by {worst:.2f}: not the same work"
        )


def _best_workers(beton: Path, cores: int, seconds: float, say: Say) -> int:
    """The number of worker processes that serves the reference best."""
    found = {}
    for workers in sorted({max(1, cores - 1), cores, cores + 1, 2 * cores}):
        found[workers] = contenders.images_per_second(contenders.reference_full(beton, workers), seconds)
        say(f"reference with {workers} workers: {found[workers]:.0f} images/s")
    return max(found, key=lambda workers: found[workers])


def _rates(betons: dict[str, Path], cores: int, workers: int, effort: Effort, say: Say) -> dict[str, list[float]]:
    field: dict[str, contenders.Contender] = {}
    for name, beton in betons.items():
        field[f"ours_crops_{name}"] = contenders.ours_crops(beton, cores)
        field[f"reference_crops_{name}"] = contenders.reference_crops(beton, workers)
        field[f"ours_full_{name}"] = contenders.ours_full(beton, cores)
        field[f"reference_full_{name}"] = contenders.reference_full(beton, workers)
    rates: dict[str, list[float]] = {name: [] for name in field}
    for number in range(effort.rounds):
        for name, contender in field.items():
            rates[name].append(contenders.images_per_second(contender, effort.seconds))
            say(f"round {number + 1}: {name}: {rates[name][-1]:.0f} images/s")
    return rates


def _floor(beton: Path, cores: int) -> tuple[float, dict[str, float]]:
    seconds, parts = contenders.floor_seconds(beton)
    return seconds / cores, parts


def _conversions(source: Path, effort: Effort, say: Say) -> dict[str, list[float]]:
    both = {"convert_original": conversion.ours, "convert_ffcv_writer": conversion.ffcv_writer}
    rates: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(effort.conversions):
        for name, measure in both.items():
            rates[name].append(measure(source, 2))
            say(f"{name}: {rates[name][-1]:.0f} images/s")
    return rates


def _repeated(images: Path, folder: Path, count: int) -> Path:
    """A folder of links to the images, again and again until there are `count`, in one class for each of theirs."""
    files = sorted(path for path in images.rglob("*") if path.is_file() and path.suffix.lower() in (".jpeg", ".jpg"))
    if not files:
        raise UserError(f"{images}: no JPEGs in it; choose the pictures with --images FOLDER")
    side = statistics.median(_shorter_side(path) for path in files[:: max(1, len(files) // 50)])
    if side < VIEW_PX:
        raise UserError(
            f"{images}: its pictures are of about {side:.0f} px, views of {VIEW_PX} px, and each loader enlarges "
            "in its own way: choose larger ones with --images FOLDER"
        )
    for i in range(count):
        original = files[i % len(files)].resolve()
        link = folder / original.parent.name / f"{i}-{original.name}"  # folders and files may share their names
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(original)
    return folder


def _shorter_side(path: Path) -> int:
    with Image.open(path) as image:
        return min(image.size)


def _scratch() -> str | None:
    """Memory rather than a disk, where there is room: the disk is not what is measured."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
