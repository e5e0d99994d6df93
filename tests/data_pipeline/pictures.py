"""Image files as folders really hold them, good and bad, by name."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SQUARES = np.kron(np.array([[[250, 20, 20], [20, 250, 20]], [[20, 20, 250], [240, 240, 30]]]), np.ones((24, 32, 1)))
PICTURE = Image.fromarray(SQUARES.astype(np.uint8))  # 64 x 48: red, green / blue, yellow


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def turned_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise to see it
    return jpeg(PICTURE.transpose(Image.Transpose.ROTATE_90), exif=exif)


GREY16 = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
GOOD = {
    "plain.jpg": jpeg(PICTURE),
    "progressive.jpg": jpeg(PICTURE, progressive=True),
    "full colour.jpeg": jpeg(PICTURE, subsampling=0),
    "odd Grösse 猫.JPG": jpeg(PICTURE.crop((0, 0, 63, 47)).resize((61, 47))),
    "png named.JPEG": png(PICTURE),
    "transparent.png": png(PICTURE.convert("RGBA")),
    "palette.png": png(PICTURE.quantize(8)),
    "cmyk.jpg": jpeg(PICTURE.convert("CMYK")),
    "grey.jpg": jpeg(PICTURE.convert("L")),
    "sixteen bits.png": png(GREY16),
    "turned.jpg": turned_by_exif(),
    "bad exif.jpg": jpeg(PICTURE, exif=b"Exif\0\0MM\0*\0\0\xff\xff"),
    "one wide.png": png(PICTURE.crop((0, 0, 1, 48))),
    "one.jpg": jpeg(PICTURE.crop((0, 0, 1, 1))),
    "odd profile.jpg": jpeg(PICTURE, icc_profile=b"no profile at all"),
}
BAD = {
    "truncated.jpg": (jpeg(PICTURE)[:-600], "damaged"),
    "truncated.png": (png(GREY16)[:-40], "damaged"),
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"this is no picture", "not an image"),
    "head only.jpg": (b"\xff\xd8\xff\xe0", "not an image|damaged"),
}
