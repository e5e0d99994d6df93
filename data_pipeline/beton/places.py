"""Where the bytes of an image are: in a file of their own, in an archive, or in a cell of a table."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.beton.pixels import Unusable


class Inside(Protocol):
    """An image within a larger file. Its text names it: `shard.tar/key.jpg`."""

    def read(self) -> bytes:
        """Its bytes. Raises Unusable with the reason, or OSError."""
        ...


Place = Path | Inside
# images in order, each with the name of its class (None: it has none)
Found = list[tuple[str | None, Place]]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an uncompressed tar: `size` bytes from `offset` on."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """Its bytes."""
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise Unusable("the archive ends before it does")
        return data


def read(place: Place) -> bytes:
    """The bytes of an image. Raises Unusable with the reason."""
    try:
        if not isinstance(place, Path):
            return place.read()
        if not stat.S_ISREG(place.stat().st_mode):
            raise Unusable("not a regular file")  # reading a pipe would wait for ever
        return place.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None
