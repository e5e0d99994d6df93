"""Stochastic depth whose masks do not depend on the number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SampleDropPath(nn.Module):
    """Drops the residual branch of a sample with probability `p` while training (stochastic depth).

    All ranks seed their generators alike at every step. Each draws the mask of the whole global batch and takes its
    own samples' part, so that a sample meets the same mask whatever the world size: rows `[V * B]`, view-major.
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
        views = x.shape[0] // self.images_per_rank
        # drawn in fp32 whatever the precision of x: a draw must not depend on it
        draws = torch.rand(views, world, self.images_per_rank, device=x.device)[:, rank]
        keep = (draws >= self.p).to(x.dtype).div_(1.0 - self.p).reshape(-1, *[1] * (x.ndim - 1))
        return x * keep

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"p={self.p}"
