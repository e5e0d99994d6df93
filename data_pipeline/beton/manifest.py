"""The manifest beside a beton, `NAME.beton.manifest.jsonl`: what the file holds and where it came from.

The first line is an object about the whole file; then one line per sample, in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import StrictModel

FORMAT = 1


class Manifest(StrictModel):
    """The first line of a manifest. channels: of the pixels; 3 is not written, which older versions would refuse."""

    format: int
    count: int
    bytes: int
    tables_crc32: int
    classes: tuple[str, ...]
    sources: tuple[str, ...]
    options: dict[str, Any]
    versions: dict[str, str]
    channels: int = 3

    def source_of(self, beton: Path, sample_id: int) -> str | None:
        """The path a sample was made from, or None when the manifest does not tell."""
        try:
            line = next(islice(sample_lines(beton), sample_id, None), None)
        except (OSError, ValueError):
            return None
        return line.get("path") if line else None


def manifest_path(beton: Path) -> Path:
    """Where the manifest of a beton lies."""
    return beton.with_name(beton.name + ".manifest.jsonl")


def read_manifest(beton: Path) -> Manifest:
    """The head of a beton's manifest. Raises UserError when it is missing or unreadable."""
    path = manifest_path(beton)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = Manifest.model_validate_json(file.readline())
    except FileNotFoundError:
        raise UserError(f"{beton}: its manifest {path.name} is missing; copy it here too, or convert again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise UserError(f"{path}: not a manifest of a beton; convert the images again") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: manifest format {manifest.format}, this program reads {FORMAT}; convert again")
    return manifest


def sample_lines(beton: Path) -> Iterator[dict[str, Any]]:
    """One object per sample: path, label, bytes, crc32, width, height, mode."""
    with open(manifest_path(beton), encoding="utf-8") as file:
        next(file)
        for line in file:
            yield json.loads(line)
