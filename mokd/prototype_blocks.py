"""The fused loss on a block of logits, in torch operations that stay in place and, on CPUs, in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mokd.losses import Target


def log_sum_exp(z: Tensor) -> Tensor:
    """Over the last dimension."""
    return z.logsumexp(dim=-1)


def gradient(
    z: Tensor, log_z: Tensor, mass: Tensor, targets: Sequence[tuple[Target, float]], start: int, dots: Tensor
) -> Tensor:
    """See `mokd.prototype_loss.Kernels`."""
    stop = start + z.shape[-1]
    cuts = [target.probabilities[..., start:stop] for target, _ in targets]
    all_views = z.sum(dim=0) if any(target.paired for target, _ in targets) else z
    paired: Tensor | None = None
    for i, ((target, factor), p) in enumerate(zip(targets, cuts, strict=True)):
        if not target.paired:
            dots[i] += (z[target.first_view :] * p).sum()
            continue
        # every view meets the sum of all targets, less its own
        own = min(p.shape[0], z.shape[0])
        dots[i] += (all_views * p.sum(dim=0)).sum() - (z[:own] * p[:own]).sum()
        paired = p * factor if paired is None else paired.add_(p, alpha=factor)
    z.sub_(log_z.unsqueeze(-1)).exp_().mul_(mass.view(-1, 1, 1))
    if paired is not None:
        own = min(paired.shape[0], z.shape[0])
        z.sub_(paired.sum(dim=0))
        z[:own].add_(paired[:own])
    for (target, factor), p in zip(targets, cuts, strict=True):
        if not target.paired:
            z[target.first_view :].sub_(p, alpha=factor)
    return z
