"""Is a beton what its manifest says, byte for byte? Names every sample that is not."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.beton.format import MODE_RAW, open_beton
from data_pipeline.beton.manifest import read_manifest, sample_lines
from data_pipeline.beton.pixels import Unusable, decode
from data_pipeline.core.errors import UserError


@dataclass(frozen=True)
class BadSample:
    """A sample whose bytes are not as they were written, or do not decode."""

    sample_id: int
    path: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """`problem`: what is wrong with the file as a whole, or None. The beton is good when `ok`."""

    samples: int
    problem: str | None
    bad: tuple[BadSample, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None and not self.bad


def verify(beton: Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Reads every sample of a beton, compares checksums, and decodes it.

    Raises UserError when there is no beton or no manifest to compare it with.
    """
    if not beton.is_file():
        raise UserError(f"{beton}: no such beton; make one with: mokd convert IMAGE_FOLDER {beton}")
    manifest = read_manifest(beton)
    problem: str | None = None
    try:
        open_beton(beton)
    except UserError as error:
        problem = str(error)
    bad: list[BadSample] = []
    with open(beton, "rb") as file:
        for sample_id, line in enumerate(sample_lines(beton)):
            reason = _check(file, line, manifest.channels)
            if reason:
                bad.append(BadSample(sample_id, line["path"], reason))
            if progress:
                progress(sample_id + 1, manifest.count)
    return VerifyReport(manifest.count, problem, tuple(bad))


def _check(file: BinaryIO, line: dict[str, int], channels: int) -> str | None:
    try:
        file.seek(line["offset"])
        data = file.read(line["bytes"])
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if len(data) < line["bytes"]:
        return "the file ends before the sample does"
    if zlib.crc32(data) != line["crc32"]:
        return "its bytes are not those that were written"
    size = (line["width"], line["height"])
    if line["mode"] == MODE_RAW:
        return None if len(data) == size[0] * size[1] * channels else "its size does not match its pixels"
    try:
        return None if decode(data).size == size else "its size is not what the manifest says"
    except Unusable as error:
        return str(error)
