"""What lies in folders of images beside plain files: pipes, circles, folders that cannot be read, other formats."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.images import Mode
from data_pipeline.beton.sources import list_images
from tests.support import ROOT, mokd


@pytest.fixture
def classes(picture_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, in three class folders."""
    return shutil.copytree(picture_folder, tmp_path / "pictures")


def test_a_pipe_is_skipped_by_name(classes: Path, tmp_path: Path) -> None:
    os.mkfifo(classes / "class_0" / "pipe.jpg")
    report = convert([classes], tmp_path / "out.beton")
    assert [(Path(s.path).name, s.reason) for s in report.skipped] == [("pipe.jpg", "not a regular file")]
    assert report.written == 24


def test_links_are_followed_but_not_in_circles(classes: Path) -> None:
    before = list_images([classes])
    (classes / "class_0" / "again").symlink_to(classes / "class_0")
    (classes / "class_1" / "up").symlink_to(classes)
    (classes / "class_3").symlink_to(classes / "class_2")
    found = list_images([classes])
    assert len([path for path in found.paths if "class_0/again" in str(path)]) == 0
    # "up" leads to the whole folder once: what lies in it and is not above it
    assert len([path for path in found.paths if "class_1/up" in str(path)]) == 3 * 8
    assert found.labels.count(3) == 8
    assert len(found.paths) == len(before.paths) + 3 * 8 + 8


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_a_class_folder_that_cannot_be_read_stops_the_conversion(classes: Path, tmp_path: Path) -> None:
    (classes / "class_1").chmod(0)
    command = [sys.executable, "-m", "launcher.cli", "convert", str(classes), str(tmp_path / "out.beton")]
    if os.geteuid() == 0:  # root reads everything, unless it gives that up
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    (classes / "class_1").chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert "class_1: cannot be read: Permission denied; its images would be missing" in done.stderr
    assert not (tmp_path / "out.beton").exists()


def test_formats_that_cannot_be_read_are_named(classes: Path, tmp_path: Path) -> None:
    (classes / "class_0" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    report = convert([classes], tmp_path / "out.beton")
    assert [Path(skipped.path).name for skipped in report.skipped] == ["photo.heic"]


def test_what_was_taken_for_classes_is_said(classes: Path, tmp_path: Path) -> None:
    done = mokd("convert", classes, tmp_path / "out.beton")
    assert "3 classes: class_0, class_1, class_2" in done.stderr
    assert "warning" not in done.stderr
    root = tmp_path / "root"
    for split in ("train", "test"):
        shutil.copytree(classes / "class_0", root / split)
    shutil.copy(next((classes / "class_0").iterdir()), root / "lonely.jpg")
    done = mokd("convert", root, tmp_path / "splits.beton")
    assert done.returncode == 0
    assert "look like parts of a data set" in done.stderr
    assert "1 images lie beside the class folders" in done.stderr


def test_a_beton_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    done = mokd("verify", tmp_path / "missing.beton")
    assert done.returncode == 2
    assert "no such beton" in done.stderr


@pytest.mark.parametrize("mode", ["original", "raw"])
def test_an_image_too_large_for_a_sample_is_skipped_with_the_way_out(tmp_path: Path, mode: Mode) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2600, 2600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.jpg", quality=100, subsampling=0)
    Image.fromarray(noise[:8, :8]).save(folder / "small.png")
    report = convert([folder], tmp_path / "out.beton", ConvertOptions(mode=mode, quality=100))
    assert [Path(skipped.path).name for skipped in report.skipped] == ["large.jpg"]
    assert "use --max-resolution" in report.skipped[0].reason
    assert not convert([folder], tmp_path / "fits.beton", ConvertOptions(mode=mode, max_resolution=1000)).skipped
