"""One image file to the bytes a beton stores: content is sniffed, orientation applied, every pixel decoded once."""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.beton.format import CHECKSUM_BYTES, MAX_SIDE, MODE_JPEG, MODE_RAW
from data_pipeline.core import native_library

Mode = Literal["original", "jpg", "raw"]

# files of these names are tried; what Pillow cannot read here (HEIC without its plugin) is named among the skipped
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    | {".avif", ".heic", ".heif", ".jp2", ".jxl"}
)
PAGE_SIZE = 8 << 20
# Below this many bytes of pixels, an image that is no JPEG is kept without loss: compressing it would save nothing.
SMALL_RAW_BYTES = 64 << 10

_ORIENTATION = 0x0112
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 27


class Unusable(Exception):
    """Why an image cannot go into a beton."""


@dataclass(frozen=True)
class Encoded:
    """What a beton stores of an image: mode (0 JPEG, 1 raw RGB), size in pixels, bytes."""

    mode: int
    width: int
    height: int
    data: bytes


def encode(path: Path, mode: Mode, max_resolution: int | None, quality: int) -> Encoded:
    """The image at `path` as it will be stored. Raises Unusable with the reason when that cannot be."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unusable("not a regular file")  # reading a pipe would wait for ever
        content = path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None
    if not content:
        raise Unusable("empty file")
    if (
        mode == "original"
        and (size := _plain_jpeg(content))
        and (max_resolution is None or max(size) <= max_resolution)
    ):
        return Encoded(MODE_JPEG, *size, content)
    image = decode(content)
    longest = max(image.size)
    shrink = max_resolution is not None and longest > max_resolution
    if mode == "original" and not shrink and _fits_as_it_is(content, image):
        return Encoded(MODE_JPEG, *image.size, content)
    image = upright_rgb(image)
    if max_resolution is not None and shrink:
        scale = max_resolution / longest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    if max(image.size) > MAX_SIDE:
        raise Unusable(f"{image.width} x {image.height} pixels: a side is longer than {MAX_SIDE}")
    raw_bytes = image.width * image.height * 3
    if mode == "raw" or (mode == "original" and not _is_jpeg(content) and raw_bytes <= SMALL_RAW_BYTES):
        return _checked(Encoded(MODE_RAW, *image.size, image.tobytes()))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return _checked(Encoded(MODE_JPEG, *image.size, buffer.getvalue()))


def decode(content: bytes) -> Image.Image:
    """The image in `content`, every pixel decoded. Raises Unusable with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and large images; what matters raises
            image = Image.open(io.BytesIO(content))
            image.load()
    except UnidentifiedImageError:
        raise Unusable("not an image of a known kind") from None
    except Image.DecompressionBombError:
        raise Unusable("more pixels than any photograph; make it smaller first") from None
    except MemoryError:
        raise Unusable("does not fit into memory") from None
    except Exception as error:  # decoders raise almost anything on damaged input
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unusable(f"damaged: {reason}") from None
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say, as 8-bit RGB without transparency."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about the pixels
        image = image.copy()
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unusable("floating-point pixels")
    return image.convert("RGB")


def _plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """The size of a JPEG that is beyond doubt, read to its end; all others are for Pillow to judge."""
    if not native_library.available() or not _is_jpeg(content) or len(content) + CHECKSUM_BYTES > PAGE_SIZE:
        return None
    size = native_library.plain_jpeg_size(content)
    return size if size and size[0] * size[1] <= _MAX_PIXELS else None


def _is_jpeg(content: bytes) -> bool:
    return content[:3] == b"\xff\xd8\xff"


def _fits_as_it_is(content: bytes, image: Image.Image) -> bool:
    if not _is_jpeg(content) or image.mode not in ("RGB", "L") or len(content) + CHECKSUM_BYTES > PAGE_SIZE:
        return False
    try:
        return image.getexif().get(_ORIENTATION, 1) in (0, 1)
    except Exception:  # as upright_rgb
        return True


def _checked(encoded: Encoded) -> Encoded:
    if len(encoded.data) + CHECKSUM_BYTES > PAGE_SIZE:
        raise Unusable(
            f"{len(encoded.data)} bytes: more than the {PAGE_SIZE >> 20} MiB a sample may have; use --max-resolution"
        )
    return encoded
