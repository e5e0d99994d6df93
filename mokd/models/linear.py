"""Linear layers on CPUs by oneDNN instead of MKL, whose products use half of what other makers' processors can do.

On an AMD EPYC, one thread, fp32: 230 GFLOP/s forward and towards the input, 170 to 200 towards the weights, where MKL
has 100 in each. On Intel's processors both are alike, and layers stay as they are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# what torch's own compiler calls for a linear layer on CPUs
_OPERATOR = "_linear_pointwise"


@cache
def is_faster() -> bool:
    """Whether this processor is one for which MKL is slow, and torch has oneDNN's linear layer."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and "AuthenticAMD" in processor and hasattr(torch.ops.mkldnn, _OPERATOR)


def use_onednn(*networks: nn.Module) -> None:
    """Makes every plain linear layer of `networks` a `OneDnnLinear`, with the same parameters and names."""
    for network in networks:
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """`nn.Linear`, with oneDNN's products in single precision on CPUs; everything else is the base class's."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        single = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if not single or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `[..., C]`, `[N, C]` and `[N]` to `[..., N]`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Rows R, inputs C, outputs N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = towards.reshape(-1, towards.shape[-1])  # [R, N]
        return (
            _product(towards, weight.T) if for_x else None,
            _product(rows.T, x.reshape(-1, x.shape[-1]).T) if for_weight else None,
            rows.sum(dim=0) if for_bias else None,
        )
