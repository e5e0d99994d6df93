"""What all ranks decide together in every step: to stop, and that every loss is finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mokd.distributed.host_copy import HostCopy


class Agreement:
    """One small collective, begun where it is constructed. On a GPU neither ranks nor streams wait for it: it takes a
    stream of its own, and what is enqueued between the construction and the answer runs on.

    terms: scalars by name; asked: whether this rank was asked to stop.
    """

    def __init__(self, terms: Mapping[str, Tensor], asked: bool, device: torch.device) -> None:
        self._names = list(terms)
        bad = ~torch.isfinite(torch.stack([value.detach().float() for value in terms.values()]))
        flags = torch.cat([torch.full((1,), int(asked), device=device), bad.to(device)]).to(torch.int32)
        if device.type != "cuda":
            self._answer = HostCopy(_maximum(flags))
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._answer = HostCopy(_maximum(flags))
        flags.record_stream(stream)

    def answer(self) -> tuple[bool, list[str]]:
        """Whether anybody was asked to stop, and the names of the terms that are not finite on some rank."""
        stopping, *broken = self._answer.values().tolist()
        return bool(stopping), [name for name, is_bad in zip(self._names, broken, strict=True) if is_bad]


def _maximum(flags: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags
