"""Stochastic depth whose masks do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mokd.distributed.host_copy import constant


@dataclass
class _MicroBatch:
    index: int = 0
    count: int = 1


_current = _MicroBatch()


@contextmanager
def micro_batch(index: int, count: int) -> Generator[None]:
    """Within, a rank's images are part `index` of `count` equal parts of its share of the batch."""
    before = (_current.index, _current.count)
    _current.index, _current.count = index, count
    try:
        yield
    finally:
        _current.index, _current.count = before


class SampleDropPath(nn.Module):
    """Drops the residual branch of a sample with probability `p` while training (stochastic depth).

    All ranks seed their generators alike at every step, and again for every micro-batch. Each draws the mask of the
    whole global batch and takes its own samples' part, so that a sample meets the same mask whatever the world size and
    the number of micro-batches: rows `[V * B]`, view-major.
    """

    def __init__(self, p: float, images_per_rank: int) -> None:
        super().__init__()
        self.p = p
        self.images_per_rank = images_per_rank
        self.keep: Tensor | None = None  # `[V * B]`, drawn for all layers together

    def forward(self, x: Tensor) -> Tensor:
        """`x` with dropped samples at zero and the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0.0:
            return x
        keep = self.keep
        if keep is None or keep.shape[0] != x.shape[0] or keep.dtype != x.dtype:
            draws = _draws(1, x.shape[0], self.images_per_rank, x.device)[0]
            keep = (draws >= self.p).to(x.dtype).div_(1.0 - self.p)
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"p={self.p}"


@contextmanager
def drawn_together(layers: Sequence[SampleDropPath], images: Tensor) -> Generator[None]:
    """Within, layers of a network that is called on `images` `[V * B, ...]` take masks that were drawn for all at once.

    On CPUs these are the numbers that they draw by themselves in the order of `layers`.
    """
    if not layers or not layers[0].training or torch.compiler.is_compiling():  # which fuses the draws
        yield
        return
    device = images.device
    half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half else images.dtype
    draws = _draws(len(layers), images.shape[0], layers[0].images_per_rank, device)
    dropped = constant(tuple(layer.p for layer in layers), torch.float32, device).unsqueeze(1)
    kept = constant(tuple(1.0 - layer.p for layer in layers), torch.float64, device).unsqueeze(1)
    for layer, keep in zip(layers, (draws >= dropped).to(dtype).div_(kept), strict=True):
        layer.keep = keep
    try:
        yield
    finally:
        for layer in layers:
            layer.keep = None


def _draws(layers: int, rows: int, images_per_rank: int, device: torch.device) -> Tensor:
    """Of this rank's samples `[layers, V * B]`, uniform in [0, 1); fp32 whatever the precision of what is dropped."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images = images_per_rank // _current.count
    draws = torch.rand(layers, rows // images, world, images_per_rank, dtype=torch.float32, device=device)
    own = slice(_current.index * images, (_current.index + 1) * images)
    return draws[:, :, rank, own].flatten(1)
