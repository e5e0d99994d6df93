"""Large temporary tensors on the CPU, whose memory is used again.

What a step needs once it needs in every step. Asked for afresh, memory costs a page fault per 4 KiB, together as much
as the work that is done in it, or more where a virtual machine has to ask its host. So blocks are kept, in huge pages
where the kernel grants them, and lent to one tensor after another.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORTHWHILE_BYTES = 8 << 20

# blocks that no tensor uses, by size
_idle: defaultdict[int, list[mmap.mmap]] = defaultdict(list)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`; a large tensor on a CPU gets memory that an earlier one of its size has left, if there is some.

    The memory goes back when nothing refers to the tensor's storage any more: views of it count, and gradients.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _WORTHWHILE_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device)
    block = _idle[size].pop() if _idle[size] else _new_block(size)
    lent = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(lent, _idle[size].append, block)  # the storage holds `lent` as long as it lives
    return torch.from_numpy(lent).view(dtype).view(*shape)


def _new_block(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
