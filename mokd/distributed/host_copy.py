"""Numbers on their way between device and host, without either waiting for the other."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, `[n]`. Made once: bringing them to a GPU makes the host wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


class HostCopy:
    """A copy of a small tensor. On a GPU it arrives when the device has come to it; `values` waits for that moment.

    That is not a wait for the device to finish: what is enqueued later runs on meanwhile.
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.device.type != "cuda":
            self._host, self._arrived = tensor.detach().clone(), None
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def ready(self) -> bool:
        """Whether `values` would answer at once."""
        return self._arrived is None or self._arrived.query()

    def values(self) -> Tensor:
        """The numbers, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
