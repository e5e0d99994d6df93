"""The elementwise work of a synchronised BatchNorm on one rank's batch: CUDA's kernels, and the same in plain torch.

What crosses ranks is not here: see `mokd.models.sync_batchnorm`. CUDA's are the kernels of torch's own SyncBatchNorm,
one launch each; they have no CPU version, so the plain ones say what they compute and are what runs anywhere else.

Shape letters: B images, C channels, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mokd.losses.kernels.targets import at_least_fp32

Statistics = tuple[Tensor, Tensor]


def statistics(x: Tensor, eps: float) -> Statistics:
    """Mean and `1 / sqrt(variance + eps)` `[C]` of this rank's `[B, C, ...]`, in fp32 or better."""
    if x.is_cuda:
        return torch.batch_norm_stats(x, eps)
    x = at_least_fp32(x)
    dims = _over(x)
    mean = x.mean(dims)
    return mean, torch.rsqrt(x.var(dims, correction=0) + eps)


def merged(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    counts: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> Statistics:
    """The statistics of all ranks together, from those `[W, C]` of each over `counts` `[W]` elements.

    Moves the running mean and the (unbiased) running variance. `x` tells CUDA the type alone.
    """
    if x.is_cuda:
        return torch.batch_norm_gather_stats_with_counts(x, means, inverses, *running, momentum, eps, counts)
    total, weights = counts.sum(), counts.unsqueeze(1)
    mean = (means * weights).sum(0) / total
    variances = inverses.square().reciprocal() - eps
    variance = ((variances + (means - mean).square()) * weights).sum(0) / total
    running_mean, running_var = running
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * total / (total - 1.0)).to(running_var.dtype), momentum)
    return mean, torch.rsqrt(variance + eps)


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, of_all: Statistics, eps: float) -> Tensor:
    """`(x - mean) * inverse * weight + bias` in the type of x."""
    mean, inverse = of_all
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
    y = (at_least_fp32(x) - _as(mean, x)) * _as(inverse, x)
    if weight is not None and bias is not None:
        y = y * _as(weight, x) + _as(bias, x)
    return y.to(x.dtype)


def reduced(grad: Tensor, x: Tensor, weight: Tensor | None, of_all: Statistics) -> tuple[Tensor, ...]:
    """This rank's sums `[C]` of grad and of `grad * (x - mean)`, and its gradients of weight and bias."""
    mean, inverse = of_all
    if x.is_cuda:
        return torch.batch_norm_backward_reduce(grad, x, mean, inverse, weight, True, True, True)
    grad, dims = at_least_fp32(grad), _over(x)
    sums, products = grad.sum(dims), (grad * (at_least_fp32(x) - _as(mean, x))).sum(dims)
    return sums, products, products * inverse, sums


def towards_input(
    grad: Tensor, x: Tensor, weight: Tensor | None, of_all: Statistics, sums: Statistics, counts: Tensor
) -> Tensor:
    """The gradient of x, from the sums of `reduced` over all ranks and the int32 `counts` `[W]` of elements."""
    mean, inverse = of_all
    if x.is_cuda:
        return torch.batch_norm_backward_elemt(grad, x, mean, inverse, weight, *sums, counts)
    total = counts.sum()
    along = _as(sums[1] / total * inverse.square(), x) * (at_least_fp32(x) - _as(mean, x))
    towards = (at_least_fp32(grad) - _as(sums[0] / total, x) - along) * _as(inverse, x)
    return (towards if weight is None else towards * _as(weight, x)).to(x.dtype)


def _over(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _as(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(1, -1, *[1] * (x.ndim - 2))


# Shapes alone, for tracing and compiling: torch has none for these kernels. Statistics are fp32 for half precision.


def _per_channel(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(x.new_empty(x.shape[1], dtype=exact) for _ in range(rows))


def _register(name: str, shapes: Callable[..., Any]) -> None:
    torch.library.register_fake(f"aten::{name}", shapes, allow_override=True)


_register("batch_norm_stats", lambda x, eps: _per_channel(x, 2))
_register("batch_norm_gather_stats_with_counts", lambda x, *_: _per_channel(x, 2))
_register("batch_norm_elemt", lambda x, *_: torch.empty_like(x))
_register("batch_norm_backward_reduce", lambda grad, x, *_: _per_channel(x, 4))
_register("batch_norm_backward_elemt", lambda grad, x, *_: torch.empty_like(x))
