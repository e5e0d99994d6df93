"""Pixels of 16 bits, and of more or fewer channels than three."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.pixels import Unusable, pixels
from data_pipeline.beton.samples import open_samples
from data_pipeline.core.errors import UserError
from tests.data_pipeline.pictures import PICTURE, jpeg, png
from tests.support import mokd

RAMP8 = np.linspace(0, 255, 64 * 48).astype(np.uint8).reshape(48, 64)
RAMP12 = (np.linspace(0, 4095, 64 * 48)).astype(np.uint16).reshape(48, 64)
EXPECTED12 = RAMP12 * 255.0 / 4095


def with_chunk(content: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk, behind its head."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content[:33] + chunk + content[33:]


def tiff(values: np.ndarray, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def colour_png(values: np.ndarray) -> bytes:
    return cv2.imencode(".png", values[..., [2, 1, 0, 3][: values.shape[2]]])[1].tobytes()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


GREY12 = png(Image.fromarray(RAMP12))
COLOUR12 = colour_png(np.repeat(RAMP12[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("content", "bits"),
    [
        (GREY12, 12),
        (COLOUR12, 12),
        (with_chunk(GREY12, b"sBIT", b"\x0c"), None),  # as it is
        (with_chunk(png(Image.fromarray(RAMP12 << 4 | RAMP12 >> 8)), b"sBIT", b"\x0c"), None),  # as the standard says
        (with_chunk(COLOUR12, b"sBIT", b"\x0c\x0c\x0c"), None),
        (tiff(RAMP12, extratags=[(281, 3, 1, 4095, True)]), None),
        (tiff(RAMP12), 12),
    ],
)
def test_pixels_of_twelve_bits_use_the_whole_range(content, bits):
    found = pixels(content, None, 3, bits)
    assert found.values.shape == (48, 64, 3)
    assert found.peak is None
    assert np.abs(found.values - EXPECTED12[..., None]).max() <= 1.0
    assert np.array_equal(pixels(content, None, 1, bits).values[..., 0], found.values[..., 0])


def test_dark_images_that_keep_to_the_standard_stay_dark():
    dark = (RAMP12 >> 5) << 4  # of twelve bits, stretched: multiples of 16
    found = pixels(with_chunk(png(Image.fromarray(dark)), b"sBIT", b"\x0c"), None, 3, None).values
    assert found.max() == round(int(dark.max()) * 255 / 65535)


def test_sixteen_bits_are_as_before():
    full = RAMP8.astype(np.uint16) * 257
    for content in (png(Image.fromarray(full)), colour_png(np.repeat(full[..., None], 3, axis=2))):
        found = pixels(content, None, 3, None)
        assert np.array_equal(found.values[..., 1], RAMP8)
        assert found.peak == 65535
    with pytest.raises(Unusable, match="holds the value 65535: more than 4095, the largest of its 12 bits"):
        pixels(png(Image.fromarray(full)), None, 3, 12)


def test_what_looks_dark_is_refused_with_the_option(tmp_path: Path) -> None:
    folder = tmp_path / "microscope"
    folder.mkdir()
    (folder / "a.png").write_bytes(GREY12)
    (folder / "b.png").write_bytes(COLOUR12)
    refused = mokd("convert", folder, tmp_path / "out.beton")
    assert refused.returncode == 2
    assert "no value above 4095" in refused.stderr
    assert "--bits 12" in refused.stderr
    assert not list(tmp_path.glob("out.beton*"))
    assert mokd("convert", folder, tmp_path / "out.beton", "--bits", "12").returncode == 0
    assert open_samples(tmp_path / "out.beton").pixels(0).max() == 255
    convert([folder], tmp_path / "dark.beton", ConvertOptions(bits=16))
    assert open_samples(tmp_path / "dark.beton").pixels(0).max() == 16


def bands(channels: int, dtype: type = np.uint8, height: int = 40, width: int = 56) -> np.ndarray:
    generator = np.random.default_rng(channels)
    return generator.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    folder, deep = tmp_path / "in", bands(channels, np.uint16)
    folder.mkdir()
    values = bands(channels)
    contents = {"a.npy": npy(values), "b.tif": tiff(values, photometric="minisblack", planarconfig="contig")}
    contents["c.tif"] = tiff(np.moveaxis(values, -1, 0), photometric="minisblack", planarconfig="separate")
    contents["d.tif"] = tiff(deep, photometric="minisblack", planarconfig="contig")
    if channels in (2, 4):
        contents["e.png"] = png(Image.fromarray(values))
    if channels == 4:
        contents["f.png"] = colour_png(deep)
    contents["g.jpg"], contents["h.npy"] = jpeg(PICTURE), npy(values.astype(np.float32))
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    report = convert([folder], tmp_path / "out.beton", ConvertOptions(channels=channels))
    assert {Path(s.path).name for s in report.skipped} == {"g.jpg", "h.npy"}
    assert "float32" in report.skipped[1].reason
    samples = open_samples(tmp_path / "out.beton", channels)
    expected = np.round(deep / 257.0)
    for i, name in enumerate(sorted(contents.keys() - {"g.jpg", "h.npy"})):
        assert np.array_equal(samples.pixels(i), expected if name in ("d.tif", "f.png") else values), name
    with pytest.raises(UserError, match=f"have {channels} channels, data.channels is 3: set it to {channels}"):
        open_samples(tmp_path / "out.beton")
    shrunk = convert([folder], tmp_path / "small.beton", ConvertOptions(channels=channels, max_resolution=28))
    assert shrunk.written == report.written
    assert open_samples(tmp_path / "small.beton", channels).pixels(0).shape == (20, 28, channels)


@pytest.mark.parametrize("mode", ["original", "jpg", "raw"])
def test_grey(tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    grey = jpeg(PICTURE.convert("L"))
    contents = {
        "a.jpg": jpeg(PICTURE),
        "b.jpg": grey,
        "c.png": png(PICTURE),
        "d.npy": npy(np.asarray(PICTURE.convert("L"))),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    convert([folder], tmp_path / "out.beton", ConvertOptions(channels=1, mode=mode))
    samples = open_samples(tmp_path / "out.beton", 1)
    for i in range(4):
        found = samples.pixels(i)
        assert found.shape == (48, 64, 1)
        assert np.abs(found[..., 0].astype(int) - np.asarray(PICTURE.convert("L"))).mean() < 4.0
    if mode == "original":
        assert samples.beton.read(1) == grey


def test_statistics_of_a_folder_and_of_its_beton(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = [(40, 56), (10, 10), (33, 21)]
    arrays = [bands(4, np.uint8, *size) // (i + 1) for i, size in enumerate(sizes)]
    for i, values in enumerate(arrays):
        (folder / f"{i}.npy").write_bytes(npy(values))
    (folder / "bad.npy").write_bytes(b"")
    means = np.mean([a.mean((0, 1)) / 255 for a in arrays], axis=0)
    squares = np.mean([((a / 255.0) ** 2).mean((0, 1)) for a in arrays], axis=0)
    stds = np.sqrt(squares - means**2)
    convert([folder], tmp_path / "out.beton", ConvertOptions(channels=4))
    for source in (folder, tmp_path / "out.beton"):
        done = mokd("convert", "--statistics", source, "--channels", "4")
        assert done.returncode == 0, done.stderr
        for name, wanted in (("mean", means), ("std", stds)):
            line = next(line for line in done.stdout.splitlines() if line.startswith(f"views.{name}=["))
            assert np.allclose([float(x) for x in line.partition("[")[2].rstrip("]").split(",")], wanted, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.beton", "out.beton.manifest.jsonl"]


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "GIF", "AVIF", "BMP", "PPM", "JPEG2000"])
def test_formats(kind: str) -> None:
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": [PICTURE.transpose(0)]} if kind in ("GIF", "TIFF", "WEBP") else {}
    PICTURE.save(buffer, kind, **options)  # of several frames or pages the first
    found = pixels(buffer.getvalue(), None, 3, None).values
    assert np.abs(found.astype(int) - np.asarray(PICTURE)).mean() < 12.0
