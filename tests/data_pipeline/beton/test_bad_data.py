from __future__ import annotations

import os
import struct
import time

import pytest

from data_pipeline.beton.format import open_beton
from data_pipeline.beton.manifest import manifest_path
from data_pipeline.beton.verify import verify
from data_pipeline.config import CropConfig, DataConfig
from data_pipeline.core.errors import DataError, UserError
from data_pipeline.loaders.build import build_eval_loader, build_loader

pytestmark = pytest.mark.filterwarnings("ignore:data.workers")


def make(path, views, backend="ffcv", **more):
    data = DataConfig(train=path, backend=backend, workers=2, **more)
    return build_loader(data, views, seed=0, rank=0, world_size=1, global_batch=4)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_missing(tmp_path, small_views, backend):
    with pytest.raises(UserError, match="no such") as error:
        make(tmp_path / "none.beton", small_views, backend)
    assert "none.beton" in one_line(error)


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "cut off"),
        (lambda path: os.truncate(path, 5000), "cut off"),
        (lambda path: os.truncate(path, 10), "not a beton"),
        (lambda path: os.truncate(path, 0), "not a beton"),
        (lambda path: manifest_path(path).unlink(), "manifest .* is missing"),
        (lambda path: manifest_path(path).write_text("{}\n"), "not a manifest"),
        (lambda path: overwrite(path, 0, struct.pack("<H", 1)), "beton version 1"),
        (lambda path: overwrite(path, 2100, b"\xff\xfe"), "does not match its manifest"),
        (lambda path: path.write_bytes(b"\x02\x00" + b"x" * 100_000), "its fields are not"),
    ],
)
def test_not_whole(own_beton, small_views, backend, damage, message):
    damage(own_beton)
    with pytest.raises(UserError, match=message) as error:
        make(own_beton, small_views, backend)
    assert str(own_beton) in one_line(error)


def test_folder_for_ffcv(picture_folder, small_views):
    with pytest.raises(UserError, match="convert it first") as error:
        make(picture_folder, small_views)
    one_line(error)


def test_folder_without_images(tmp_path, small_views):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="no images in it"):
        make(tmp_path, small_views, "torchvision")


def test_crop_larger_than_resize(beton):
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "batch_size": 4, "workers": 1}
    with pytest.raises(UserError, match="crop of 64"):
        build_eval_loader(beton, resize_px=48, crop_px=64, **plain)


def test_blur_that_is_too_wide(beton, small_views):
    views = small_views.model_copy(update={"blur_radius_px": (0.1, 9.0)})
    with pytest.raises(UserError, match="blur_radius_px"):
        make(beton, views)


def overwrite(path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
@pytest.mark.parametrize("zeros", [True, False])
def test_damaged_sample_is_named(own_beton, small_views, backend, zeros):
    info = open_beton(own_beton)
    offset, size = int(info.offsets[13]), int(info.sizes[13])
    if zeros:
        overwrite(own_beton, offset, bytes(size))
    else:
        overwrite(own_beton, offset + size // 2, b"\x55")
    loader = make(own_beton, small_views, backend)
    with pytest.raises(DataError, match=r"sample 13 \(.*jpg\): its bytes are not those") as error:
        list(loader.epoch(0))
    one_line(error)
    loader.close()
    report = verify(own_beton)
    assert [bad.sample_id for bad in report.bad] == [13]
    assert report.problem is None


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_file_that_shrinks_while_it_is_read(own_beton, small_views, backend):
    loader = make(own_beton, small_views, backend)
    info = open_beton(own_beton)
    os.truncate(own_beton, int(info.offsets[20]) + 10)
    with pytest.raises(DataError, match=r"sample 2[0-3].*ends before the sample"):
        list(loader.epoch(0))
    loader.close()


def test_damaged_sample_in_evaluation(own_beton):
    overwrite(own_beton, int(open_beton(own_beton).offsets[5]) + 99, bytes(50))
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "batch_size": 4, "workers": 1}
    with pytest.raises(DataError, match="sample 5"):
        list(build_eval_loader(own_beton, resize_px=48, crop_px=40, **plain))


def test_stuck_disk_ends_in_an_error(own_beton, small_views, monkeypatch):
    loader = make(own_beton, small_views, batch_timeout_seconds=0.5)
    monkeypatch.setattr("data_pipeline.core.native_library.Engine.cut", lambda *_: time.sleep(3))
    with pytest.raises(DataError, match="no batch within"):
        list(loader.epoch(0))


def test_crop_sizes_of_one_pixel(beton, small_views):
    tiny = CropConfig(count=2, size_px=1, area_scale=(0.05, 0.25), blur_probability=(0.5,))
    loader = make(beton, small_views.model_copy(update={"local_crops": tiny}))
    assert next(iter(loader.epoch(0))).views[1].shape == (2, 4, 3, 1, 1)
    loader.close()
