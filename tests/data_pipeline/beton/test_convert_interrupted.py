"""Conversions that are cut off: full disks, killed converters, dead workers; and how they continue."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.manifest import manifest_path, sample_lines
from data_pipeline.beton.verify import verify
from data_pipeline.core.errors import UserError
from tests.data_pipeline.pictures import GOOD
from tests.support import ROOT


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk(tmp_path, picture_folder):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(UserError, match="disk"):
            convert([picture_folder], disk / "x.beton", ConvertOptions(mode="raw"))
        assert not (disk / "x.beton").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_after_a_full_disk_it_continues(tmp_path, picture_folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.beton.writer.os.fsync", full)
        with pytest.raises(UserError, match=r"x\.beton: the disk is full.*--resume") as error:
            convert([picture_folder], tmp_path / "x.beton")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.beton").exists()
    assert not manifest_path(tmp_path / "x.beton").exists()
    monkeypatch.setattr("data_pipeline.beton.encoding.encode", None)  # nothing is left to encode
    convert([picture_folder], tmp_path / "x.beton", ConvertOptions(resume=True))
    assert verify(tmp_path / "x.beton").ok
    assert {path.name for path in tmp_path.glob("x.beton*")} == {"x.beton", "x.beton.manifest.jsonl"}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    source = tmp_path / "many"
    source.mkdir()
    for i in range(900):
        (source / f"{i:03d}.jpg").write_bytes(GOOD["plain.jpg"] if i % 50 else b"no picture")
    return source


def kill_at(image: int, source: Path, out: Path) -> None:
    """Converts in another process that is killed when it has come to an image."""
    program = (
        "import os, signal; from pathlib import Path; from data_pipeline.beton.convert import convert\n"
        f"stop = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == {image} else None\n"
        f"convert([Path({str(source)!r})], Path({str(out)!r}), None, stop)"
    )

    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, cwd=ROOT)
    assert done.returncode == -9
    assert not out.exists()
    assert not manifest_path(out).exists()


@pytest.mark.parametrize("torn", [False, True])
def test_killed_converter_continues_where_it_was(many, tmp_path, torn):
    whole, out = tmp_path / "whole.beton", tmp_path / "out.beton"
    expected = convert([many], whole)
    kill_at(600, many, out)
    if torn:  # as a power failure may leave it: the journal is there, the data are not
        size = os.path.getsize(tmp_path / "out.beton.partial")
        with open(tmp_path / "out.beton.partial", "r+b") as file:
            file.seek(size - 100_000)
            file.write(bytes(100))
    begun: list[int] = []
    report = convert([many], out, ConvertOptions(resume=True), lambda done, _: begun.append(done))
    assert 300 < begun[0] < 600
    assert (begun[0] > 500) is not torn
    assert out.read_bytes() == whole.read_bytes()
    assert list(sample_lines(out)) == list(sample_lines(whole))
    assert (report.written, report.skipped) == (expected.written, expected.skipped)
    assert len(report.skipped) == 18


def test_only_the_same_conversion_is_continued(many, tmp_path):
    out = tmp_path / "out.beton"
    kill_at(300, many, out)
    with pytest.raises(UserError, match="other images or options"):
        convert([many], out, ConvertOptions(resume=True, mode="raw"))
    (many / "one more.jpg").write_bytes(GOOD["plain.jpg"])
    with pytest.raises(UserError, match="other images or options"):
        convert([many], out, ConvertOptions(resume=True))
    convert([many], out)  # starts over
    assert verify(out).ok
    assert not list(tmp_path.glob("*.partial*"))


def test_resume_without_anything_to_resume(picture_folder, tmp_path):
    convert([picture_folder], tmp_path / "x.beton", ConvertOptions(resume=True))
    assert verify(tmp_path / "x.beton").ok


def test_two_conversions_of_the_same_name(picture_folder, tmp_path):
    def second(*_):
        with pytest.raises(UserError, match="another conversion is writing it"):
            convert([picture_folder], tmp_path / "x.beton")

    convert([picture_folder], tmp_path / "x.beton", None, second)
    assert verify(tmp_path / "x.beton").ok


@pytest.mark.parametrize("failure", ["raise SystemError('a bug')", "raise MemoryError", "os._exit(3)"])
def test_a_worker_that_dies_ends_the_conversion(many, tmp_path, failure):
    program = (
        "import os; from pathlib import Path; import data_pipeline.beton.encoding as e\n"
        "from data_pipeline.beton.convert import *\n"
        "encode = e.encode\n"
        "def dies(path, *rest):\n"
        f"    if path.name == '700.jpg': {failure}\n"
        "    return encode(path, *rest)\n"
        "e.encode = dies\n"
        f"convert([Path({str(many)!r})], Path({str(tmp_path / 'x.beton')!r}))"
    )

    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, cwd=ROOT, capture_output=True)
    assert done.returncode != 0
    assert not (tmp_path / "x.beton").exists()
