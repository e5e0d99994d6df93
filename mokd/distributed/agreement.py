"""What all ranks decide together: to stop, in a step and in long work between steps, and that every loss is finite."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from mokd.distributed.host_copy import HostCopy
from mokd.distributed.process_group import all_reduce_max
from mokd.distributed.stopping import StopRequest

T = TypeVar("T")


class BrokenOffError(Exception):
    """All ranks have agreed to break long work off, because one was asked to stop."""


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
            self._answer = HostCopy(all_reduce_max(flags))
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._answer = HostCopy(all_reduce_max(flags))
        flags.record_stream(stream)

    def answer(self) -> tuple[bool, list[str]]:
        """Whether anybody was asked to stop, and the names of the terms that are not finite on some rank."""
        stopping, *broken = self._answer.values().tolist()
        return bool(stopping), [name for name, is_bad in zip(self._names, broken, strict=True) if is_bad]


def until_asked(items: Iterable[T], rounds: int, stop: StopRequest, device: torch.device) -> Generator[T]:
    """The items of this rank, one a round, with a small agreement before each; all ranks go through `rounds` rounds.

    rounds: at least as many as any rank has items. BrokenOffError on all ranks when any was asked to stop.
    """
    own = iter(items)
    try:
        for _ in range(rounds):
            asked = all_reduce_max(torch.full((1,), int(stop.reason is not None), dtype=torch.int32, device=device))
            if int(asked):
                stop.request("another rank was asked to stop")
                raise BrokenOffError
            for item in own:
                yield item
                break
    finally:
        if isinstance(own, Generator):
            own.close()
