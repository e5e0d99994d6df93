"""BatchNorm over the batches of all ranks, on CPUs too.

torch's SyncBatchNorm refuses CPU tensors; this one is built on a differentiable all-reduce and equals one process
with the whole batch. On GPUs torch's own is used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


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


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Synchronised BatchNorm for CPU tensors `[B, C, ...]`, with the parameters and buffers of the one it replaces."""

    def __init__(self, replaced: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            replaced.num_features, replaced.eps, replaced.momentum, replaced.affine, replaced.track_running_stats
        )
        # the same objects: optimisers and averages may hold references to them
        self.weight, self.bias = replaced.weight, replaced.bias
        self.running_mean, self.running_var = replaced.running_mean, replaced.running_var
        self.num_batches_tracked = replaced.num_batches_tracked
        self.train(replaced.training)
        # timm's fused norm + activation layers carry these two
        self.drop = getattr(replaced, "drop", nn.Identity())
        self.act = getattr(replaced, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """The input normalised by the statistics of the global batch (of the running ones in evaluation mode)."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return self.act(self.drop(super().forward(input)))
        with torch.autocast("cpu", enabled=False):
            x = input if input.dtype == torch.float64 else input.float()
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
        return self.act(self.drop(y.to(input.dtype)))

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        unbiased = variance * count / (count - 1.0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)  # type: ignore[union-attr]
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)  # type: ignore[union-attr]


def synchronize_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm replaced by one that is synchronised over ranks."""
    if device.type != "cpu":
        return convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, CpuSyncBatchNorm):
                setattr(parent, name, CpuSyncBatchNorm(child))
    return module
