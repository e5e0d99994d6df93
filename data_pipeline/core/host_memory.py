"""Host memory that outlives a batch: fresh memory costs a page fault per 4 KiB, which is more than the work on it."""

from __future__ import annotations

import math
import weakref
from collections import deque
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

    block: uint8 tensor `[bytes]`, pinned when it is meant for a GPU. crops: uint8 `[B, bytes of a sample]`.
    parameters: uint8 `[B, bytes]`, beginning at `parameters_start` of the block.
    """

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

    def next(self, count: int) -> Packed:
        """A slot cut to `count` samples."""
        slot = self._slots[0]
        self._slots.rotate(-1)
        start = _aligned(count * self._crop_bytes)
        end = start + count * self._parameter_bytes
        memory = slot.numpy()
        crops = memory[: count * self._crop_bytes].reshape(count, self._crop_bytes)
        parameters = memory[start:end].reshape(count, self._parameter_bytes)
        return Packed(slot[:end], crops, parameters, start)


class Recycler:
    """Tensors on the CPU whose memory is used again once nobody holds them, or anything that shares their memory."""

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._free: dict[int, deque[NDArray[np.uint8]]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, deque(maxlen=self._keep))
        memory = free.pop() if free else np.empty(size, np.uint8)
        # the storage of the tensor holds `lent` and nothing else does: it dies with the last tensor on that storage
        lent = memory[:]
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
