"""Large temporary tensors on the CPU, in huge pages: in small ones a page fault per 4 KiB costs as much as the work."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_WORTHWHILE_BYTES = 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`; on a CPU the kernel is advised to back a large one with huge pages, which it may ignore."""
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size >= _WORTHWHILE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = tensor.data_ptr() + size
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return tensor
