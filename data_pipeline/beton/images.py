"""One image to the bytes a beton stores: JPEGs kept where they can be, everything else decoded once and encoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from data_pipeline.beton.format import CHECKSUM_BYTES, MAX_SIDE, MODE_JPEG, MODE_RAW
from data_pipeline.beton.pixels import MAX_PIXELS, Unusable, decode, pixels, upright
from data_pipeline.beton.places import Place, read
from data_pipeline.core import native_library

Mode = Literal["original", "jpg", "raw"]

PAGE_SIZE = 8 << 20
# Below this many bytes of pixels, an image that is no JPEG is kept without loss: compressing it would save nothing.
SMALL_RAW_BYTES = 64 << 10


@dataclass(frozen=True)
class Storage:
    """How images are stored: see `convert.ConvertOptions`."""

    mode: Mode
    max_resolution: int | None
    quality: int
    channels: int = 3
    bits: int | None = None


@dataclass(frozen=True)
class Encoded:
    """What a beton stores of an image: mode (0 JPEG, 1 raw pixels), size in pixels, bytes. peak: see `Pixels`."""

    mode: int
    width: int
    height: int
    data: bytes
    peak: int | None = None


def encode(place: Place, storage: Storage) -> Encoded:
    """The image at `place` as it will be stored. Raises Unusable with the reason when that cannot be."""
    content = read(place)
    if not content:
        raise Unusable("empty file")
    mode, limit = storage.mode, storage.max_resolution
    size = _plain_jpeg(content) if mode == "original" and storage.channels == 3 else None
    if size and (limit is None or max(size) <= limit):
        return Encoded(MODE_JPEG, *size, content)
    image = decode(content) if _is_jpeg(content) else None
    if image and mode == "original" and _fits_as_it_is(content, image, storage):
        return Encoded(MODE_JPEG, *image.size, content)
    found = pixels(content, image, storage.channels, storage.bits)
    values = found.values
    if limit is not None and max(values.shape[:2]) > limit:
        values = _shrunk(values, limit)
    height, width = values.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise Unusable(f"{width} x {height} pixels: a side is longer than {MAX_SIDE}; use --max-resolution")
    small = mode == "original" and image is None and values.nbytes <= SMALL_RAW_BYTES
    if mode == "raw" or small or storage.channels not in (1, 3):
        return _checked(Encoded(MODE_RAW, width, height, values.tobytes(), found.peak))
    buffer = io.BytesIO()
    image = Image.fromarray(values.squeeze(2) if storage.channels == 1 else values)
    image.save(buffer, "JPEG", quality=storage.quality)
    return _checked(Encoded(MODE_JPEG, width, height, buffer.getvalue(), found.peak))


def _shrunk(values: np.ndarray, limit: int) -> np.ndarray:
    height, width = values.shape[:2]
    scale = limit / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if values.shape[2] == 3:
        return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC))
    planes = [Image.fromarray(values[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(values.shape[2])]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """The size of a JPEG that is beyond doubt, read to its end; all others are for Pillow to judge."""
    if not native_library.available() or not _is_jpeg(content) or len(content) + CHECKSUM_BYTES > PAGE_SIZE:
        return None
    size = native_library.plain_jpeg_size(content)
    return size if size and size[0] * size[1] <= MAX_PIXELS else None


def _is_jpeg(content: bytes) -> bool:
    return content[:3] == b"\xff\xd8\xff"


def _fits_as_it_is(content: bytes, image: Image.Image, storage: Storage) -> bool:
    limit, kinds = storage.max_resolution, {1: ("L",), 3: ("RGB", "L")}.get(storage.channels, ())
    if len(content) + CHECKSUM_BYTES > PAGE_SIZE or (limit is not None and max(image.size) > limit):
        return False
    return image.mode in kinds and upright(image)


def _checked(encoded: Encoded) -> Encoded:
    if len(encoded.data) + CHECKSUM_BYTES > PAGE_SIZE:
        raise Unusable(
            f"{len(encoded.data)} bytes: more than the {PAGE_SIZE >> 20} MiB a sample may have; use --max-resolution"
        )
    return encoded
