"""Work beside the main stream of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second CUDA stream, or nothing of the kind: then what is given to it runs where it stands.

    Memory that it allocates is used again by it alone, and it begins by waiting for the main stream. So no tensor needs
    to be recorded: when something new is written there, the main stream has finished with what was.
    """

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        self._stream = torch.cuda.Stream(device) if wanted and device.type == "cuda" else None

    @contextmanager
    def begin(self) -> Iterator[None]:
        """What is enqueued within runs beside what the main stream gets afterwards, until `join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The main stream goes on when everything here is done; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
