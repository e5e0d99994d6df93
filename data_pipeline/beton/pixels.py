"""Bytes of an image file to 8-bit pixels: content is sniffed, orientation applied, every pixel decoded once.

Pixels of 16 bits are scaled by the bits that they use, where the file or the user says how many: cameras and
microscopes store 10, 12 or 14 bits, and taken for 16 those are nearly black.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 27

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_INSTALL = 'install it with: pip install "mokd[multispectral]"'


class Unusable(Exception):
    """Why an image cannot go into a beton."""


@dataclass(frozen=True)
class Pixels:
    """An upright image: uint8 `[H, W, C]`, and the largest value of 16-bit pixels whose file does not say how many
    bits they use (None for all others).
    """

    values: NDArray[np.uint8]
    peak: int | None = None


def decode(content: bytes) -> Image.Image:
    """The image in `content`, every pixel decoded. Raises Unusable with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and large images; what matters raises
            image = Image.open(io.BytesIO(content))
            image.load()
    except UnidentifiedImageError:
        more = "; a TIFF of other than 1 or 3 channels needs --channels" if content.startswith(_TIFF) else ""
        raise Unusable("not an image of a known kind" + more) from None
    except Image.DecompressionBombError:
        raise Unusable("more pixels than any photograph; make it smaller first") from None
    except MemoryError:
        raise Unusable("does not fit into memory") from None
    except Exception as error:  # decoders raise almost anything on damaged input
        raise Unusable(f"damaged: {_first_line(error)}") from None
    return image


def pixels(content: bytes, image: Image.Image | None, channels: int, bits: int | None) -> Pixels:
    """The pixels of a file, turned as its EXIF data say. Raises Unusable with the reason.

    image: what `decode` made of `content`, if it was asked already. channels: 1 is grey and 3 RGB without
    transparency, whatever the file holds; any other number has to be the file's own. bits: how many of 16 the pixels
    use, instead of what the file says.
    """
    if content.startswith(_NPY):
        return _scaled(_with_channels(_array(content), channels), None, bits)
    if content.startswith(_TIFF) and channels not in (1, 3):
        values = _with_channels(_tiff(content), channels)
        return _scaled(values, _stated_bits(content, values), bits)
    image = image or decode(content)
    if image.mode == "F":
        raise Unusable("floating-point pixels")
    deep: NDArray[np.uint16] | None = None
    if image.mode.startswith("I"):  # one channel of 16 bits; of 32, the upper are cut off
        deep = np.clip(np.asarray(image), 0, 0xFFFF).astype(np.uint16)
    elif _is_deep(content, image):
        deep = _deep_colours(content, bits, len(image.getbands()))
    if deep is None:
        return Pixels(_as_channels(_turned(image, image), channels))
    found = _scaled(deep, _stated_bits(content, deep), bits)
    return Pixels(_as_channels(_turned(Image.fromarray(found.values), image), channels), found.peak)


def upright(image: Image.Image) -> bool:
    """Whether the image is stored as it is to be seen."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in (0, 1)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return True


def _turned(image: Image.Image, original: Image.Image) -> Image.Image:
    """The image, turned as the EXIF data of `original` say."""
    if upright(original):
        return image
    if image is not original:
        image.getexif()[_ORIENTATION] = original.getexif()[_ORIENTATION]
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image


def _as_channels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    if channels in (1, 3):
        values = np.asarray(image.convert("RGB"))
        return values if channels == 3 else np.asarray(Image.fromarray(values).convert("L"))[..., None]
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in ("LA", "RGBA") or len(image.getbands()) != channels:
        raise Unusable(f"its pixels are {image.mode}, not of {channels} channels")
    return np.asarray(image)


def _scaled(values: NDArray[Any], stated: int | None, bits: int | None) -> Pixels:
    """Pixels of 8 or 16 bits to 8: the largest value that `bits` (or what the file states) can hold becomes 255."""
    if values.dtype == np.uint8:
        return Pixels(values)
    peak = int(values.max())
    largest = (1 << (bits or 16)) - 1 if bits or stated is None else stated
    if peak > largest:
        raise Unusable(f"holds the value {peak}: more than {largest}, the largest of its {largest.bit_length()} bits")
    eight = ((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8)
    return Pixels(eight, peak if bits is None and stated is None else None)


def _stated_bits(content: bytes, values: NDArray[Any]) -> int | None:
    """The largest value that the pixels can have by what the file says of itself; None when it says nothing.

    values: of the pixels, all 16 bits.
    """
    if content.startswith(_PNG):
        bits = _significant_bits(content)
        if bits is None or not 1 <= bits < 16:
            return 0xFFFF if bits == 16 else None
        # the standard has such data stretched to all 16 bits, many programs store them as they are
        unstretched = values.max() < 1 << bits and (values & ((1 << (16 - bits)) - 1)).any()
        return (1 << bits) - 1 if unstretched else 0xFFFF
    if content.startswith(_TIFF):
        try:
            with Image.open(io.BytesIO(content)) as file:
                tags: Any = getattr(file, "tag_v2", {})
                largest, depth = (_largest(tags.get(tag)) for tag in (_MAX_SAMPLE_VALUE, _BITS_PER_SAMPLE))
        except Exception:  # kinds that only tifffile reads
            largest, depth = _tiff_largest(content), None
        if largest is not None and 0 < largest <= 0xFFFF:
            return largest
        return (1 << depth) - 1 if depth is not None and 8 < depth < 16 else None
    # grey maps of more than 8 bits come stretched from Pillow
    return 0xFFFF if content.startswith(b"P") else None


def _largest(value: Any) -> int | None:
    if value is None:
        return None
    return int(max(value)) if isinstance(value, tuple) else int(value)


def _significant_bits(content: bytes) -> int | None:
    """What the chunk sBIT of a PNG says of its colours."""
    at = len(_PNG)
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        if kind == b"sBIT" and length:
            return max(content[at + 8 : at + 8 + length])
        if kind in (b"IDAT", b"IEND"):
            return None
        at += length + 12
    return None


def _is_deep(content: bytes, image: Image.Image) -> bool:
    """Whether these are colours of 16 bits, of which Pillow keeps the upper 8."""
    if content.startswith(_PNG):
        return content[24:25] == b"\x10"
    depth = _largest(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)) if content.startswith(_TIFF) else None
    return depth == 16


def _deep_colours(content: bytes, bits: int | None, bands: int) -> NDArray[np.uint16] | None:
    """All 16 bits, `[H, W, 3 or 4]`, by OpenCV, which comes with FFCV; None where it is not there and not needed."""
    try:
        import cv2
    except ImportError:
        if bits in (None, 16):
            return None
        raise Unusable("colours of 16 bits are read by OpenCV; install it with: pip install opencv-python") from None
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if bands < 3 or found is None or found.dtype != np.uint16 or found.ndim != 3 or found.shape[2] != bands:
        return None
    order = [2, 1, 0, 3][: found.shape[2]]
    return np.ascontiguousarray(found[..., order])


def _array(content: bytes) -> NDArray[Any]:
    try:
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
    except Exception as error:  # numpy raises many kinds on damaged input
        raise Unusable(f"damaged: {_first_line(error)}") from None


def _tiff(content: bytes) -> NDArray[Any]:
    """A TIFF of any number of channels, `[H, W, C]` or `[C, H, W]` as stored."""
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            series = file.series[0]
            if int(np.prod(series.shape)) > 4 * MAX_PIXELS:
                raise Unusable("more pixels than any photograph; make it smaller first")
            values = np.asarray(series.asarray())
            axes = series.axes
    except Unusable:
        raise
    except Exception as error:  # as above
        raise Unusable(f"damaged: {_first_line(error)}") from None
    # samples before rows: planes, or pages, one after the other
    return np.moveaxis(values, 0, -1) if values.ndim == 3 and not axes.startswith("Y") else values


def _tiff_largest(content: bytes) -> int | None:
    with _tifffile().TiffFile(io.BytesIO(content)) as file:
        tag = file.pages[0].tags.get(_MAX_SAMPLE_VALUE)
    return _largest(tag.value) if tag else None


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise Unusable(f"a TIFF of other than 1 or 3 channels is read by tifffile; {_INSTALL}") from None
    return tifffile


def _with_channels(values: NDArray[Any], channels: int) -> NDArray[Any]:
    """`[H, W, C]` of 8 or 16 unsigned bits, or Unusable."""
    if values.ndim == 2:
        values = values[..., None]
    if values.dtype.newbyteorder("=") not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise Unusable(f"its values are {values.dtype}; expected unsigned integers of 8 or 16 bits")
    if values.ndim != 3 or values.shape[2] != channels:
        raise Unusable(f"its shape is {list(values.shape)}, expected [height, width, {channels}]")
    if not values.size:
        raise Unusable("has no pixels")
    if values.shape[0] * values.shape[1] > MAX_PIXELS:
        raise Unusable("more pixels than any photograph; make it smaller first")
    return values.astype(values.dtype.newbyteorder("="))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
