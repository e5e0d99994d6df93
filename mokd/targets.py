"""From what teachers say to what students are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from mokd import prototype_native
from mokd.losses import at_least_fp32


def teacher_probabilities(logits: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    """`softmax((t - center) / T)` over the last dimension, in fp32 or better; no gradient."""
    logits = at_least_fp32(logits.detach())
    if prototype_native.by_prototype(logits):
        found = prototype_native.softmax(logits, center, temperature, torch.empty_like(logits))
        if found is not None:
            return found
    scaled = logits / temperature if center is None else (logits - center).div_(temperature)
    return softmax(scaled)


def softmax(scaled: Tensor) -> Tensor:
    """Over the last dimension; on CPUs in the memory of `scaled`, where fresh memory costs as much as the softmax."""
    if prototype_native.by_prototype(scaled):
        found = prototype_native.softmax(scaled, None, 1.0, scaled)
        if found is not None:
            return found
    return torch.softmax(scaled, dim=-1, out=scaled if scaled.device.type == "cpu" else None)
