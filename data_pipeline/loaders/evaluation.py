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


def centre_geometry(
    widths: NDArray[np.int64], heights: NDArray[np.int64], resize_px: int, crop_px: int
) -> NDArray[np.float64]:
    """torchvision's Resize and CenterCrop as one cut: the box in source pixels and the whole image for the filter.

    Returns `[B, 1, 8]`.
    """
    sides = np.stack([widths, heights], axis=-1)
    resized = np.floor(resize_px * sides / sides.min(axis=-1, keepdims=True))
    corner, scale = np.rint((resized - crop_px) / 2.0), sides / resized
    return np.concatenate([corner * scale, crop_px * scale, np.zeros_like(scale), sides], axis=-1)[:, None]
