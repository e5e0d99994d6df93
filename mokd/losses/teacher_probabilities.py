"""From what teachers say to what students are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from mokd.losses.kernels import cpu
from mokd.losses.kernels.targets import at_least_fp32


def teacher_probabilities(
    logits: Tensor, center: Tensor | None, temperature: float, *, in_place: bool = False
) -> Tensor:
    """`softmax((t - center) / T)` over the last dimension, in fp32 or better; no gradient.

    in_place: the logits may be overwritten, and their memory taken.
    """
    logits = at_least_fp32(logits.detach())
    out = logits if in_place else torch.empty_like(logits)
    if (found := cpu.softmax(logits, center, temperature, out)) is not None:
        return found
    shifted = logits if center is None else torch.sub(logits, center, out=out)
    return softmax(torch.div(shifted, temperature, out=out))


def softmax(scaled: Tensor) -> Tensor:
    """Over the last dimension; on CPUs in the memory of `scaled`, where fresh memory costs as much as the softmax."""
    if (found := cpu.softmax(scaled, None, 1.0, scaled)) is not None:
        return found
    return torch.softmax(scaled, dim=-1, out=scaled if scaled.device.type == "cpu" else None)
