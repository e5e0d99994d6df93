"""Large temporary tensors on the CPU, whose memory is used again: what a step needs once it needs in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.core.host_memory import Recycler

_WORTHWHILE_BYTES = 8 << 20

_memory = Recycler()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`; a large tensor on a CPU gets memory that an earlier one of its size has left, if there is some.

    The memory goes back when nothing refers to the tensor's storage any more: views of it count, and gradients.
    """
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < _WORTHWHILE_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device)
    return _memory.empty(shape, dtype)
