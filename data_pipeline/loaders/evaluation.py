"""Labelled images for evaluation: which ones a rank sees, and how their centre is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.beton.samples import Samples
from data_pipeline.loaders.batch import LabelledBatch
from data_pipeline.sampling.order import Int64Array


@dataclass(frozen=True)
class EvalPlan:
    """What to load: the samples `ids` (int64, in order) of `samples` in batches, and their transform."""

    samples: Samples
    ids: Int64Array
    batch_size: int
    resize_px: int
    crop_px: int
    mean: tuple[float, ...]  # one per channel
    std: tuple[float, ...]
    workers: int
    device: torch.device


class EvalLoader:
    """Iterable over `LabelledBatch`, again and again: dataset_size samples over all ranks, num_classes classes."""

    def __init__(
        self, plan: EvalPlan, batches: Callable[[EvalPlan], Iterator[LabelledBatch]], dataset_size: int
    ) -> None:
        self.dataset_size, self.num_classes = dataset_size, plan.samples.num_classes
        self._plan, self._batches = plan, batches

    def __len__(self) -> int:
        return -(-len(self._plan.ids) // self._plan.batch_size)

    def __iter__(self) -> Iterator[LabelledBatch]:
        for batch in self._batches(self._plan):
            yield LabelledBatch(batch.images.to(self._plan.device), batch.sample_ids, batch.labels)


def resized_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height after torchvision's Resize(shorter)."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def centre_geometry(
    widths: NDArray[np.int64], heights: NDArray[np.int64], resize_px: int, crop_px: int
) -> NDArray[np.float64]:
    """Resize and centre crop as one cut: the box in source pixels and the whole image for the filter, `[B, 1, 8]`."""
    geometry = np.empty((len(widths), 1, 8))
    for i, (width, height) in enumerate(zip(widths.tolist(), heights.tolist(), strict=True)):
        new_width, new_height = resized_size(width, height, resize_px)
        left, top = round((new_width - crop_px) / 2.0), round((new_height - crop_px) / 2.0)
        x_scale, y_scale = width / new_width, height / new_height
        box = (left * x_scale, top * y_scale, crop_px * x_scale, crop_px * y_scale)
        geometry[i, 0] = (*box, 0, 0, width, height)
    return geometry
