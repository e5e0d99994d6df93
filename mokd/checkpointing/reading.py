"""Reading checkpoints: verified file by file, and what is wrong with one told apart.

Unreadable now: the file system refuses; asked again with pauses, then CheckpointUnreadableError, a failure that
another start may not meet. Of a newer format: a UserError naming it. Damaged: DamagedCheckpointError with the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.core.errors import UserError
from mokd.runs.files import checksum, file_checksum, read_json

FORMAT = 1
CHECKSUMS = "checksums.json"
STATE = "state.json"
# pauses before an unreadable checkpoint is read again: half a minute, longer than a file server's restart often takes
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# files read and hashed at once: hashing holds no lock, and a file server answers several readers sooner than one
READERS = 8


class DamagedCheckpointError(Exception):
    """Something is missing from a checkpoint, or is not what was written; the text says what."""


class CheckpointUnreadableError(OSError):
    """The file system does not give a checkpoint out, again and again; it may be whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        return read_json(self.path / CHECKSUMS) or {}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, `name` without suffix, on the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    @contextmanager
    def open(self, name: str) -> Generator[SavedTensors]:
        """One file, to be read tensor by tensor."""
        with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
            yield SavedTensors(file, list(file.keys()))


@dataclass(frozen=True)
class SavedTensors:
    """The tensors of an open file whose names begin with `prefix`, named without it."""

    file: Any
    names: Sequence[str]
    prefix: str = ""

    def below(self, prefix: str) -> SavedTensors:
        """Those whose names begin with `prefix`."""
        return SavedTensors(self.file, [n for n in self.names if n.startswith(prefix)], prefix)

    def keys(self) -> list[str]:
        """Their names."""
        return [name.removeprefix(self.prefix) for name in self.names]

    def shape(self, key: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        return list(self.file.get_slice(self.prefix + key).get_shape())

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it: nothing else is read from the disk."""
        if rows is None:
            return self.file.get_tensor(self.prefix + key)
        part = self.file.get_slice(self.prefix + key)
        return part[rows.start : rows.stop] if part.get_shape() else self.file.get_tensor(self.prefix + key)


def read_checkpoint(path: Path, pauses: Sequence[float] | None = None) -> Checkpoint:
    """The checkpoint in a directory, once every file of it matches its checksum.

    pauses: seconds to wait before each further try where it cannot be read. DamagedCheckpointError,
    CheckpointUnreadableError, UserError, as the module says.
    """
    for pause in (*(PAUSES_SECONDS if pauses is None else pauses), None):
        try:
            return _verified(path)
        except OSError as error:
            if pause is None:
                raise CheckpointUnreadableError(error.errno, f"{error.strerror}, again and again", str(path)) from None
            time.sleep(pause)
    raise AssertionError  # the last turn returns or raises


def _verified(path: Path) -> Checkpoint:
    try:
        checksums = _mapping(path / CHECKSUMS, (path / CHECKSUMS).read_bytes())
        # the newer format is believed only where its name is what was written
        content = (path / STATE).read_bytes()
        if checksum(content) != checksums.get(STATE):
            raise DamagedCheckpointError(f"{STATE} has changed")
        state = _mapping(path / STATE, content)
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path}: is of checkpoint format {state.get('format')}, this program reads {FORMAT}; "
                "resume with the version of the program that wrote it"
            )
        del checksums[STATE]
        with ThreadPoolExecutor(READERS, "checksums") as readers:
            found = readers.map(file_checksum, [path / name for name in checksums])
            for (name, expected), seen in zip(checksums.items(), found, strict=True):
                if seen != expected:
                    raise DamagedCheckpointError(f"{name} has changed")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedCheckpointError(f"{Path(str(error.filename)).name} is missing") from None
    return Checkpoint(path, int(state["step"]), state)


def _mapping(file: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise DamagedCheckpointError(f"{file.name} is not whole")
    return found
