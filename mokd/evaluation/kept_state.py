"""The state of a training that an evaluation does, kept between its epochs so that a call again continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mokd.distributed.process_group import barrier, broadcast_from_main
from mokd.runs.files import replace_bytes

log = logging.getLogger(__name__)

EPOCHS = "epochs"


class KeptState:
    """One file of tensors and of the number of epochs they have seen; the first rank writes, all read.

    path: a `.safetensors` file, named after everything that the training follows from.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self._path, self._is_main = path, is_main

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Epochs done and the tensors; 0 and nothing where there is no whole state."""
        if not broadcast_from_main(self._is_whole() if self._is_main else False):
            return 0, {}
        tensors = load(self._path.read_bytes())
        return int(tensors.pop(EPOCHS)), tensors

    def _is_whole(self) -> bool:
        try:
            load(self._path.read_bytes())
            return True
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError):
            log.warning("%s: damaged; this training starts over", self._path)
            return False

    def save(self, epochs: int, tensors: Mapping[str, Tensor]) -> None:
        """Replaces what is kept, by rename."""
        if self._is_main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            replace_bytes(self._path, save({**kept, EPOCHS: torch.tensor(epochs)}), durable=True)

    def remove(self) -> None:
        """Forgets it, when the result is known."""
        barrier()  # not while another rank reads
        if self._is_main:
            self._path.unlink(missing_ok=True)
