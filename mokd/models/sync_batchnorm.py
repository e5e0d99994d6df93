"""BatchNorm over the batches of all ranks; it equals one process with the whole batch.

Two ways to the same numbers. On GPUs launches and collectives are what costs: `GpuSyncBatchNorm` gathers every rank's
mean and deviation in one collective a pass, and nothing in it is read on the host. torch's SyncBatchNorm does the same,
but leaves out ranks with an empty batch, by a mask that the host has to wait for three times a pass; ours are equal. On
CPUs, where a second collective is cheap, `CpuSyncBatchNorm` sums centred values, which does not cancel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mokd.distributed.process_group import world_size
from mokd.losses.kernels.targets import at_least_fp32
from mokd.models import batchnorm_kernels as kernels


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm, ABC):
    """Synchronised BatchNorm of `[B, C, ...]`, with the parameters and buffers of the one it replaces."""

    counts_itself = True  # its passes; else `CountsBatches` does

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        # the same objects: optimisers and averages may hold references to them
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)
        # timm's fused norm + activation layers carry these two
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """The input normalised by the statistics of the global batch (of the running ones in evaluation mode)."""
        if not (self.training and world_size() > 1):
            return self.act(self.drop(super().forward(input)))
        return self.act(self.drop(self._over_ranks(input)))

    @abstractmethod
    def _over_ranks(self, input: Tensor) -> Tensor:
        """The input normalised by the statistics of all ranks' batches."""

    def _momentum(self) -> float:
        """Of the running statistics, with this pass counted."""
        assert self.num_batches_tracked is not None
        if self.counts_itself:
            self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class CountsBatches(nn.Module):
    """A module that calls each of its BatchNorms once in a pass, and counts the passes for all of them together."""

    counted: Sequence[_SyncBatchNorm] = ()

    def count_batch(self) -> None:
        """At the beginning of a pass."""
        if self.training and self.counted and world_size() > 1:
            counts = [norm.num_batches_tracked for norm in self.counted if norm.training]
            torch._foreach_add_([count for count in counts if count is not None], 1)


class CpuSyncBatchNorm(_SyncBatchNorm):
    """On a differentiable all-reduce, for CPU tensors."""

    def _over_ranks(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = at_least_fp32(input)
            dims = [0, *range(2, x.ndim)]
            shape = [1, -1] + [1] * (x.ndim - 2)
            # two passes: the variance of centred values does not cancel
            sums = _SumOverRanks.apply(torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])]))
            count = sums[-1].detach()
            mean = sums[:-1] / count
            centred = x - mean.view(shape)
            variance = _SumOverRanks.apply(centred.square().sum(dims)) / count
            self._update_running(mean.detach(), variance.detach(), count)
            y = centred * torch.rsqrt(variance + self.eps).view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats:
            return
        momentum = self._momentum()
        unbiased = variance * count / (count - 1.0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)  # type: ignore[union-attr]
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)  # type: ignore[union-attr]


class GpuSyncBatchNorm(_SyncBatchNorm):
    """In one gather forwards and one all-reduce backwards, without host reads. Every rank's batch has the same size."""

    def _over_ranks(self, input: Tensor) -> Tensor:
        as_it_is = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last)
        x = input if as_it_is else input.contiguous()  # CUDA's kernels take both orders
        elements, ranks = x.numel() // x.shape[1], world_size()
        running: tuple[Tensor | None, Tensor | None] = (None, None)
        momentum = 0.0
        if self.track_running_stats:
            running, momentum = (self.running_mean, self.running_var), self._momentum()
        return _NormOverRanks.apply(x, self.weight, self.bias, *running, elements, ranks, momentum, self.eps)


class _NormOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        elements: int,
        ranks: int,
        momentum: float,
        eps: float,
    ) -> Tensor:
        own = torch.stack(kernels.statistics(x, eps))
        everyone = own.new_empty(ranks * 2, own.shape[1])
        dist.all_gather_into_tensor(everyone, own)
        means, inverses = everyone.view(-1, *own.shape).unbind(1)
        running = (running_mean, running_var)
        counts = _counts(elements, ranks, own.dtype, own.device)
        of_all = kernels.merged(x, means, inverses, counts, running, momentum, eps)
        ctx.save_for_backward(x, weight, *of_all, _counts(elements, ranks, torch.int32, own.device))
        return kernels.normalized(x, weight, bias, of_all, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *of_all, counts = ctx.saved_tensors
        order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad = grad.contiguous(memory_format=order)
        sums, products, for_weight, for_bias = kernels.reduced(grad, x, weight, (of_all[0], of_all[1]))
        # every rank's loss depends on every rank's input
        everyone = torch.stack([sums, products])
        dist.all_reduce(everyone)
        of_grad = (everyone[0], everyone[1])
        towards = kernels.towards_input(grad, x, weight, (of_all[0], of_all[1]), of_grad, counts)
        if weight is None:
            return towards, *[None] * 8
        return towards, for_weight, for_bias, *[None] * 6


@lru_cache(maxsize=128)
def _counts(elements: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once for every shape: bringing numbers to a GPU makes the host wait for it."""
    return torch.full((ranks,), elements, dtype=dtype, device=device)


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm replaced by one that is synchronised over ranks."""
    kind = CpuSyncBatchNorm if device.type == "cpu" else GpuSyncBatchNorm
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, _SyncBatchNorm):
                setattr(parent, name, kind(child))
    for owner in module.modules():
        if isinstance(owner, CountsBatches):
            norms = [norm for norm in owner.modules() if isinstance(norm, _SyncBatchNorm)]
            owner.counted = [norm for norm in norms if norm.track_running_stats]
            for norm in owner.counted:
                norm.counts_itself = False
    return module
