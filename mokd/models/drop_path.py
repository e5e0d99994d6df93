"""Stochastic depth whose masks do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """`x` with dropped samples at zero and the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0.0:
            return x
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        images = self.images_per_rank // _current.count
        views = x.shape[0] // images
        # drawn in fp32 whatever the precision of x: a draw must not depend on it
        draws = torch.rand(views, world, self.images_per_rank, dtype=torch.float32, device=x.device)[:, rank]
        draws = draws[:, _current.index * images : (_current.index + 1) * images]
        keep = (draws >= self.p).to(x.dtype).div_(1.0 - self.p).reshape(-1, *[1] * (x.ndim - 1))
        return x * keep

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"p={self.p}"
