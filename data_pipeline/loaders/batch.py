"""What every loader hands out, whichever backend reads the images."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ViewBatch:
    """One batch of multi-crop views, owned by the receiver: no buffer of the loader is aliased.

    views: one tensor per group of equally sized views, each `[V_g, B, C, S_g, S_g]`, normalised, on the
    loader's device in its dtype; global views first. sample_ids, labels: int64 `[B]` on the CPU (label -1: none).
    """

    views: tuple[Tensor, ...]
    sample_ids: Tensor
    labels: Tensor


class MultiCropLoader(Protocol):
    """Multi-crop batches of one rank. `epoch` may be called again after its iterator is exhausted or closed."""

    dataset_size: int
    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch]:
        """The batches `start_step .. steps_per_epoch - 1` of an epoch, the same however it is entered."""
        ...

    def close(self) -> None:
        """Stops threads and processes and frees buffers."""
        ...


@dataclass(frozen=True)
class LabelledBatch:
    """Images for evaluation, in data-set order: images `[B, C, S, S]` normalised; sample_ids, labels int64 `[B]`."""

    images: Tensor
    sample_ids: Tensor
    labels: Tensor
