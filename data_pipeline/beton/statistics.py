"""Mean and deviation of the channels of a data set, for `views.mean` and `views.std`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.beton.convert import ConvertOptions, Skipped
from data_pipeline.beton.encoding import default_workers, in_threads
from data_pipeline.beton.format import open_beton
from data_pipeline.beton.pixels import Unusable, pixels
from data_pipeline.beton.places import Place, read
from data_pipeline.beton.samples import BetonSamples
from data_pipeline.beton.sources import list_images
from data_pipeline.beton.tables import Columns
from data_pipeline.core.errors import DataError, UserError

Moments = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """mean, std: by channel, of pixels between 0 and 1, every image weighing the same whatever its size."""

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[Skipped, ...]


def statistics(
    sources: Sequence[Path], options: ConvertOptions, progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """Mean and deviation of the images of one beton, or of what `convert` would make of the sources.

    Of the options, those that say which images these are and how their pixels are read count. Raises UserError when
    there is nothing to read.
    """
    alone = len(sources) == 1 and sources[0].suffix == ".beton"
    work, todo = _of_beton(sources[0]) if alone else _of(sources, options)
    # in order, so that sums are the same whatever the number of threads
    results = in_threads(work, todo, options.workers or default_workers())
    total, skipped = np.zeros((2, 0)), []
    images = 0
    for done, found in enumerate(results, start=1):
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            images += 1
            total = found if not total.size else total + found
        if progress:
            progress(done, len(todo))
    if not images:
        raise UserError(f"{sources[0]}: none of its images could be used; the first: {skipped[0].reason}")
    mean, square = total / images
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    return Statistics(images, tuple(mean.tolist()), tuple(std.tolist()), tuple(skipped))


# what becomes of one image, and the images
Jobs = tuple[Callable[[Any], Moments | Skipped], Sequence[Any]]


def _of_beton(path: Path) -> Jobs:
    samples = BetonSamples(open_beton(path))

    def work(sample_id: int) -> Moments | Skipped:
        try:
            return _moments(samples.pixels(sample_id))
        except DataError as error:
            return Skipped(f"sample {sample_id}", str(error))

    return work, range(samples.size)


def _of(sources: Sequence[Path], options: ConvertOptions) -> Jobs:
    columns = Columns(options.image_column, options.label_column)
    listing = list_images(sources, options.subset, options.seed, channels=options.channels, columns=columns)

    def work(place: Place) -> Moments | Skipped:
        try:
            return _moments(pixels(read(place), None, options.channels, options.bits).values)
        except Unusable as reason:
            return Skipped(str(place), str(reason))

    return work, listing.paths


def _moments(values: NDArray[np.uint8]) -> Moments:
    """`[2, C]`: the mean of an image's pixels and of their squares, between 0 and 1, by counting the 256 values."""
    levels = np.arange(256) / 255.0
    counts = [np.bincount(values[..., c].reshape(-1), minlength=256) for c in range(values.shape[2])]
    parts = np.stack(counts, axis=1) / (values.shape[0] * values.shape[1])
    return np.stack([levels @ parts, levels**2 @ parts])
