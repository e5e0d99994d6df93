"""Host memory that outlives a batch or a step: fresh memory costs a page fault per 4 KiB.

That is often more than the work on it, and more still where a virtual machine has to ask its host for memory. So blocks
are kept and lent again.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# so that parameters behind the crops can be read as 32-bit words
_ALIGNMENT = 16


@dataclass(frozen=True)
class Packed:
    """One batch in host memory, in one block: crops, then what photometrics needs to know of them.

    sample_ids, labels: int64 tensors `[B]`, not in the block: they are the receiver's to keep.
    block: uint8 tensor `[bytes]`, pinned when it is meant for a GPU. crops: uint8 `[B, bytes of a sample]`.
    parameters: uint8 `[B, bytes]`, beginning at `parameters_start` of the block.
    """

    sample_ids: Tensor
    labels: Tensor
    block: Tensor
    crops: NDArray[np.uint8]
    parameters: NDArray[np.uint8]
    parameters_start: int


class Ring:
    """Slots for batches, used in turn: `next` gives the one that was used longest ago."""

    def __init__(self, slots: int, batch: int, crop_bytes: int, parameter_bytes: int, pinned: bool) -> None:
        self._crop_bytes, self._parameter_bytes = crop_bytes, parameter_bytes
        size = _aligned(batch * crop_bytes) + batch * parameter_bytes
        self._slots = deque(torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(slots))

    def next(self, sample_ids: NDArray[np.int64], labels: NDArray[np.int64]) -> Packed:
        """A slot cut to the number of samples."""
        slot, count = self._slots[0], len(sample_ids)
        self._slots.rotate(-1)
        start = _aligned(count * self._crop_bytes)
        end = start + count * self._parameter_bytes
        memory = slot.numpy()
        crops = memory[: count * self._crop_bytes].reshape(count, self._crop_bytes)
        parameters = memory[start:end].reshape(count, self._parameter_bytes)
        return Packed(torch.tensor(sample_ids), torch.tensor(labels), slot[:end], crops, parameters, start)


class Recycler:
    """Tensors on the CPU whose memory is used again once nobody holds them, or anything that shares their memory.

    keep: blocks of a size that may lie idle (None: all). Blocks are in huge pages where the kernel grants them.
    """

    def __init__(self, keep: int | None = None) -> None:
        self._keep = keep
        self._idle: dict[int, deque[mmap.mmap]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of at least one element."""
        size = math.prod(shape) * dtype.itemsize
        idle = self._idle.setdefault(size, deque(maxlen=self._keep))
        block = idle.pop() if idle else _new_block(size)
        # the storage of the tensor holds `lent` and nothing else does: it dies with the last tensor on that storage
        lent = np.frombuffer(block, np.uint8)
        weakref.finalize(lent, idle.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)


def _new_block(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
