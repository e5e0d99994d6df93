from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as F

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.format import MODE_RAW, open_beton
from data_pipeline.beton.manifest import manifest_path, sample_lines
from data_pipeline.beton.samples import BetonSamples
from data_pipeline.beton.verify import verify
from data_pipeline.beton.writer import BetonWriter
from data_pipeline.core.errors import DataError, UserError
from data_pipeline.core.native_library import plain_jpeg_size
from tests.data_pipeline.pictures import BAD, GOOD, PICTURE, jpeg


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    folder = tmp_path / "nasty"
    (folder / "a").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.jpg").write_bytes(GOOD["plain.jpg"])
    for name, content in GOOD.items():
        (folder / "a" / name).write_bytes(content)
    for name, (content, _) in BAD.items():
        (folder / "a" / name).write_bytes(content)
    (folder / "a" / ".hidden.jpg").write_bytes(GOOD["plain.jpg"])
    (folder / "a" / "notes.txt").write_text("not meant")
    (folder / "b").mkdir()
    (folder / "b" / "link.jpg").symlink_to(folder / "a" / "plain.jpg")
    (folder / "b" / "dangling.jpg").symlink_to(folder / "nowhere")
    return folder


@pytest.mark.parametrize("mode", ["original", "jpg", "raw"])
def test_what_image_folders_really_hold(nasty, tmp_path, mode):
    out = tmp_path / "out.beton"
    report = convert([nasty], out, ConvertOptions(mode=mode, quality=95, workers=2))
    expected_bad = {**{name: reason for name, (_, reason) in BAD.items()}, "dangling.jpg": "cannot be read"}
    assert {Path(skip.path).name for skip in report.skipped} == set(expected_bad)
    for skip in report.skipped:
        assert re.search(expected_bad[Path(skip.path).name], skip.reason), skip
    assert report.written == len(GOOD) + 1
    assert report.bytes == out.stat().st_size
    assert verify(out).ok
    info = open_beton(out)
    assert info.manifest.classes == ("a", "b")
    samples = BetonSamples(info)
    for i, line in enumerate(sample_lines(out)):
        name, image = Path(line["path"]).name, samples.image(i)
        assert image.mode == "RGB"
        assert image.size == (info.widths[i], info.heights[i])
        if name in ("one wide.png", "one.jpg"):
            assert image.width == 1
            continue
        tolerance = 60 if name == "cmyk.jpg" else 25
        for x, y, colour in ((0.25, 0.25, (250, 20, 20)), (0.75, 0.75, (240, 240, 30))):
            found = np.array(image.getpixel((int(x * image.width), int(y * image.height))))
            if name in ("grey.jpg", "sixteen bits.png"):
                colour = (round(np.dot(colour, (0.299, 0.587, 0.114))),) * 3
            assert np.abs(found - colour).max() < tolerance, name
    if mode == "original":
        kept = [
            Path(line["path"]).name
            for line in sample_lines(out)
            if line["bytes"] == len(GOOD.get(Path(line["path"]).name, b""))
        ]
        assert {"plain.jpg", "progressive.jpg", "grey.jpg", "bad exif.jpg", "odd profile.jpg"} <= set(kept)
    if mode == "raw":
        assert (info.jpeg == MODE_RAW - 1).all()


def test_stock_ffcv_reads_it(picture_folder, tmp_path):
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    for mode in ("original", "raw"):
        out = tmp_path / f"{mode}.beton"
        convert([picture_folder], out, ConvertOptions(mode=mode))
        samples = BetonSamples(open_beton(out))
        for os_cache in (True, False):
            loader = Loader(
                str(out),
                batch_size=8,
                num_workers=1,
                order=OrderOption.SEQUENTIAL,
                os_cache=os_cache,
                pipelines={
                    "image": [CenterCropRGBImageDecoder((64, 64), 1.0), ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                },
            )
            images, labels = zip(*((a.numpy().copy(), b.numpy().copy()) for a, b in loader), strict=True)
            assert np.array_equal(np.concatenate(labels)[:, 0], samples.labels)
            for i, image in enumerate(np.concatenate(images)):
                expected = F.center_crop(samples.image(i), [min(samples.image(i).size)] * 2)
                assert np.abs(image.mean(axis=(0, 1)) - np.asarray(expected).mean(axis=(0, 1))).max() < 5


def test_original_mode_keeps_bytes_and_order(picture_folder, beton):
    info = open_beton(beton)
    paths = sorted(picture_folder.rglob("*.jpg"))
    assert [line["path"] for line in sample_lines(beton)] == [str(path) for path in paths]
    assert all(info.read(i) == path.read_bytes() for i, path in enumerate(paths))
    assert [line["crc32"] for line in sample_lines(beton)] == [zlib.crc32(path.read_bytes()) for path in paths]
    assert info.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_max_resolution(picture_folder, tmp_path):
    out = tmp_path / "small.beton"
    convert([picture_folder], out, ConvertOptions(mode="jpg", max_resolution=80))
    info = open_beton(out)
    original = [Image.open(line["path"]).size for line in sample_lines(out)]
    for i, (width, height) in enumerate(original):
        scale = min(1.0, 80 / max(width, height))
        assert abs(info.widths[i] - width * scale) <= 0.5
        assert abs(info.heights[i] - height * scale) <= 0.5


def test_flat_folder_and_merge(picture_folder, tmp_path):
    flat = picture_folder / "class_1"
    report = convert([flat], tmp_path / "flat.beton")
    assert report.written == 8
    assert open_beton(tmp_path / "flat.beton").labels.tolist() == [-1] * 8
    other = tmp_path / "other"
    (other / "class_2").mkdir(parents=True)
    (other / "class_2" / "more.jpg").write_bytes(GOOD["plain.jpg"])
    convert([picture_folder, other], tmp_path / "merged.beton")
    assert open_beton(tmp_path / "merged.beton").labels.tolist() == [0] * 8 + [1] * 8 + [2] * 9


def test_subset_is_seeded_and_by_class(picture_folder, tmp_path):
    def chosen(name, seed):
        convert([picture_folder], tmp_path / name, ConvertOptions(subset=0.25, seed=seed))
        return [line["path"] for line in sample_lines(tmp_path / name)]

    first = chosen("1.beton", 0)
    assert open_beton(tmp_path / "1.beton").labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert chosen("2.beton", 0) == first
    assert chosen("3.beton", 1) != first


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["none"], {}, "no such folder"),
        (["empty"], {}, "no images in it"),
        (["good/a.jpg"], {}, "not a folder"),
        (["bad"], {}, "none of the 1 images could be used; the first: .*broken.jpg"),
        (["good", "bad"], {"strict": True}, "broken.jpg: not an image.*strict"),
        (["good"], {"mode": "png"}, "expected original, jpg or raw"),
        (["good"], {"subset": 2.0}, "subset 2.0"),
        (["good"], {"quality": 0}, "quality 0"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, sources, options, message):
    for folder in ("empty", "good", "bad", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "good" / "a.jpg").write_bytes(GOOD["plain.jpg"])
    (tmp_path / "bad" / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=message) as error:
        convert([tmp_path / source for source in sources], tmp_path / "out" / "x.beton", ConvertOptions(**options))
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_beton_is_not_overwritten_by_chance(own_beton, picture_folder):
    before = own_beton.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        convert([picture_folder], own_beton)
    convert([picture_folder], own_beton, ConvertOptions(mode="jpg", overwrite=True))
    assert own_beton.read_bytes() != before
    assert verify(own_beton).ok


def test_what_does_not_read_back_is_not_published(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(BetonWriter, "_flush", damage_and(BetonWriter._flush, tmp_path / "x.beton.partial"))
    with pytest.raises(DataError, match="sample 3 does not read back"):
        convert([picture_folder], tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists()


def damage_and(flush, path):
    def damaged(self):
        flush(self)
        with open(path, "r+b") as file:
            file.seek(int(self._table["ptr"][3]) + 5)
            file.write(b"xyz")

    return damaged


@pytest.mark.parametrize("mode", ["original", "jpg", "raw"])
def test_forecast(picture_folder, tmp_path, mode):
    told = []
    report = convert([picture_folder], tmp_path / "x.beton", ConvertOptions(mode=mode, workers=12), None, told.append)
    assert told[0].images == report.written == 24
    stored = report.bytes - (8 << 20)  # without the page of the tables
    assert 0.7 * stored < told[0].bytes < 1.4 * stored
    assert told[0].seconds > 0


def test_a_disk_that_is_too_small_is_told_at_once(picture_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("data_pipeline.beton.encoding.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs about .* GB, the disk has"):
        convert([picture_folder], tmp_path / "x.beton")
    assert list(tmp_path.iterdir()) == []


def test_quick_and_thorough_checks_agree(nasty, tmp_path, monkeypatch):
    convert([nasty], tmp_path / "quick.beton")
    monkeypatch.setattr("data_pipeline.core.native_library.available", lambda: False)
    convert([nasty], tmp_path / "thorough.beton")
    assert (tmp_path / "quick.beton").read_bytes() == (tmp_path / "thorough.beton").read_bytes()


def xmp_turned() -> bytes:
    plain = jpeg(PICTURE)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:]


def exif_with(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    return jpeg(PICTURE, exif=exif)


@pytest.mark.parametrize(
    ("content", "plain"),
    [
        (GOOD["plain.jpg"], True),
        (GOOD["progressive.jpg"], True),
        (GOOD["grey.jpg"], True),
        (GOOD["odd profile.jpg"], True),
        (exif_with(1), True),
        (exif_with(3), False),
        (xmp_turned(), False),
        (GOOD["turned.jpg"], False),
        (GOOD["bad exif.jpg"], False),
        (GOOD["cmyk.jpg"], False),
        (GOOD["transparent.png"], False),
        (BAD["truncated.jpg"][0], False),
        (GOOD["plain.jpg"][:-2], False),
        (GOOD["plain.jpg"][:700] + b"\xff\xd9", False),
        (b"", False),
    ],
)
def test_only_what_is_beyond_doubt_passes_the_quick_check(content, plain):
    assert plain_jpeg_size(content) == ((64, 48) if plain else None)
    for cut in range(0, len(content), 97):  # no truncation may pass, or crash
        assert plain_jpeg_size(content[:cut]) is None


def test_verify_names_what_is_bad(own_beton):
    info = open_beton(own_beton)
    with open(own_beton, "r+b") as file:
        for sample in (3, 17):
            file.seek(int(info.offsets[sample]) + 40)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
    report = verify(own_beton)
    assert [bad.sample_id for bad in report.bad] == [3, 17]
    assert "class_0" in report.bad[0].path
    os.truncate(own_beton, int(info.offsets[22]))
    report = verify(own_beton)
    assert [bad.sample_id for bad in report.bad] == [3, 17, 22, 23]
    assert "cut off" in report.problem


def test_verify_finds_another_manifest(own_beton, beton):
    lines = manifest_path(own_beton).read_text().splitlines(keepends=True)
    head = json.loads(lines[0])
    head["tables_crc32"] ^= 1
    manifest_path(own_beton).write_text(json.dumps(head) + "\n" + "".join(lines[1:]))
    assert "does not match" in verify(own_beton).problem
