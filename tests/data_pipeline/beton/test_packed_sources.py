"""Sources of a conversion besides folders: webdataset archives, tables of Hugging Face, lists of files."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.format import open_beton
from data_pipeline.beton.manifest import sample_lines
from data_pipeline.beton.samples import open_samples
from data_pipeline.beton.sources import list_images
from data_pipeline.beton.tables import Columns
from data_pipeline.core.errors import UserError
from tests.support import ROOT

pa = pytest.importorskip("pyarrow")


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.parent.name, path.read_bytes()) for path in sorted(folder.glob("*/*.jpg"))]


@pytest.fixture
def shards(picture_folder: Path, tmp_path: Path) -> list[Path]:
    """The pictures as two archives, labels once before and once after the image."""
    pictures = contents(picture_folder)
    made = []
    for number in range(2):
        files: dict[str, bytes] = {}
        for i, (name, content) in list(enumerate(pictures))[number::2]:
            label = (
                {f"{i:03d}.json": json.dumps({"label": name}).encode()} if i % 3 else {f"{i:03d}.cls": name.encode()}
            )
            files |= {**label, f"{i:03d}.jpg": content} if i % 4 else {f"{i:03d}.jpg": content, **label}
            files[f"{i:03d}.mask.png"] = b"not an image"
        made.append(write_tar(tmp_path / f"shard-{number}.tar", files))
    return made


def features(classes: tuple[str, ...]) -> dict[bytes, bytes]:
    kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(classes)}}
    return {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}


def table_of(folder: Path, **more: list[Any]) -> Any:
    pictures = contents(folder)
    images = [{"bytes": content, "path": None} for _, content in pictures]
    labels = [int(name[-1]) for name, _ in pictures]
    columns = {"image": pa.array(images), "label": pa.array(labels, pa.int64()), **more}
    return pa.table(columns).replace_schema_metadata(features(("class_0", "class_1", "class_2")))


def write_parquet(path: Path, table: Any) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, row_group_size=5)
    return path


def write_arrow(folder: Path, table: Any) -> Path:
    """As `save_to_disk` lays a data set out."""
    folder.mkdir()
    half = len(table) // 2
    names = []
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        names.append({"filename": f"data-{number:05d}-of-00002.arrow"})
        with pa.OSFile(str(folder / names[-1]["filename"]), "wb") as file, pa.ipc.new_stream(file, part.schema) as out:
            out.write_table(part, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder


def write_list(path: Path, folder: Path) -> Path:
    between = {".csv": ",", ".tsv": "\t", ".txt": " "}[path.suffix]
    lines = [f"{picture}{between}{picture.parent.name}\n" for picture in sorted(folder.glob("*/*.jpg"))]
    path.write_text(("path,label\n" if path.suffix == ".csv" else "") + "".join(lines))
    return path


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow", "csv", "tsv", "txt"])
def test_every_source_makes_the_same_data_set(picture_folder, beton, shards, tmp_path, kind):
    if kind == "tar":
        sources = shards
    elif kind == "parquet":
        sources = [write_parquet(tmp_path / "train-00000-of-00001.parquet", table_of(picture_folder))]
    elif kind == "arrow":
        sources = [write_arrow(tmp_path / "saved", table_of(picture_folder))]
    else:
        sources = [write_list(tmp_path / f"list.{kind}", picture_folder)]
    out = tmp_path / "out.beton"
    report = convert(sources, out, ConvertOptions(workers=2))
    assert (report.written, report.skipped, report.unlabelled) == (24, (), 0)
    expected, made = open_beton(beton), open_beton(out)
    assert made.manifest.classes == expected.manifest.classes
    images = [{(int(info.labels[i]), info.read(i)) for i in range(info.size)} for info in (made, expected)]
    assert images[0] == images[1]
    assert len({line["path"] for line in sample_lines(out)}) == 24
    assert made.describe(3).startswith(f"{out}: sample 3 (")
    again = convert(sources, tmp_path / "again.beton", ConvertOptions(workers=1))
    assert again.written == 24
    assert open_samples(out).fingerprint() == open_samples(tmp_path / "again.beton").fingerprint()


def test_a_folder_of_archives_or_tables_stands_for_them(picture_folder, shards, tmp_path):
    assert len(list_images([tmp_path]).paths) == 24
    write_parquet(tmp_path / "train-0.parquet", table_of(picture_folder))
    write_parquet(tmp_path / "test-0.parquet", table_of(picture_folder))
    with pytest.raises(UserError, match=r"several parts \(test, train\)"):
        list_images([tmp_path])


def test_what_cannot_be_used_is_skipped_by_its_name(picture_folder, tmp_path):
    good = contents(picture_folder)[0][1]
    archive = write_tar(tmp_path / "a.tar", {"1.jpg": good, "2.jpg": good[:300], "3.jpg": b""})
    rows = [{"bytes": good, "path": None}, {"bytes": None, "path": "gone.jpg"}, {"bytes": None, "path": None}]
    table = write_parquet(tmp_path / "b.parquet", pa.table({"image": pa.array(rows)}))
    (tmp_path / "c.txt").write_text("gone.jpg\n")
    report = convert([archive, table, tmp_path / "c.txt"], tmp_path / "out.beton")
    assert report.written == 2
    assert {Path(skip.path).relative_to(tmp_path).as_posix(): skip.reason.split(":")[0] for skip in report.skipped} == {
        "a.tar/2.jpg": "damaged",
        "a.tar/3.jpg": "empty file",
        "b.parquet/1": "cannot be read",
        "b.parquet/2": "no image in this row",
        "gone.jpg": "cannot be read",
    }
    assert (report.classes, report.unlabelled) == ((), 7)


def test_labels_are_numbers_where_they_are_and_negative_ones_none(picture_folder, tmp_path):
    good = contents(picture_folder)[0][1]
    archive = write_tar(
        tmp_path / "a.tar", {f"{n}.{e}": c for n in (0, 2, 10) for e, c in (("cls", str(n).encode()), ("jpg", good))}
    )
    listing = list_images([archive])
    assert (listing.classes, listing.labels) == (("0", "2", "10"), (0, 1, 2))
    rows = pa.array([{"bytes": good, "path": None}] * 2)
    table = pa.table({"image": rows, "label": pa.array([-1, 2])}).replace_schema_metadata(features(("x", "y", "a")))
    listing = list_images([write_parquet(tmp_path / "b.parquet", table)])
    assert (listing.classes, listing.labels) == (("x", "y", "a"), (-1, 2))


def damaged(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_bad_sources_are_one_line(picture_folder, shards, tmp_path):
    table = write_parquet(tmp_path / "t.parquet", table_of(picture_folder, coarse=[0] * 24))
    two = pa.table({"image": ["a"], "img": ["b"], "label": [0], "cls": [1]})
    whole = shards[0].read_bytes()
    last = whole.rstrip(b"\0")
    cases = [
        (damaged(tmp_path / "cut.tar", whole[: len(whole) // 2]), "cut off|unexpected end"),
        (damaged(tmp_path / "no end.tar", last + bytes(-len(last) % 512)), "cut off"),
        (damaged(tmp_path / "none.tar", b"no archive" * 100), "not a tar archive"),
        (damaged(tmp_path / "empty.tar", b""), "not a tar archive"),
        (write_tar(tmp_path / "odd.tar", {"1.json": b"{", "1.jpg": b""}), "odd.tar/1.json: not a label"),
        (write_tar(tmp_path / "dict.tar", {"1.json": b'{"label": [1]}'}), "neither a number nor a name"),
        (write_tar(tmp_path / "text.tar", {"1.txt": b"a cat"}), "no images in it"),
        (damaged(tmp_path / "x.tar.gz", b"x"), "decompress"),
        (damaged(tmp_path / "x.zip", b"x"), "not one of .tar"),
        (damaged(tmp_path / "cut.parquet", table.read_bytes()[:500]), "cannot be read as a table"),
        (damaged(tmp_path / "none.arrow", b"no table" * 100), "cannot be read as a table"),
        (write_parquet(tmp_path / "two.parquet", two), "more than one column of images; name one of image, img"),
        (write_parquet(tmp_path / "no.parquet", pa.table({"text": ["a"]})), "no column of images; name one of text"),
        (damaged(tmp_path / "a.csv", b"a.jpg,1\nb.jpg\n"), "line 2: expected path,class"),
        (damaged(tmp_path / "b.csv", b"a.jpg,1,2\n"), "line 1"),
        (damaged(tmp_path / "c.tsv", b"\n"), "no images in it"),
        (tmp_path / "nowhere.tar", "no such folder or file"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message) as error:
            convert([source], tmp_path / "out.beton")
        assert str(source) in str(error.value)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out.beton*"))
    with pytest.raises(UserError, match="--label-column fine: no such column; there are image, label, coarse"):
        list_images([table], columns=Columns(label="fine"))
    assert list_images([table], columns=Columns(label="coarse")).classes == ("0",)
    saved = write_arrow(tmp_path / "saved", table_of(picture_folder))
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="give the folder of one of them: train, test"):
        list_images([saved])


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_killed_conversion_is_taken_up(picture_folder, shards, tmp_path, kind):
    table = write_parquet(tmp_path / "train.parquet", table_of(picture_folder))
    sources, out = (shards if kind == "tar" else [table]), tmp_path / "out.beton"
    program = (
        "import sys, time; from pathlib import Path; from data_pipeline.beton import convert, writer\n"
        "writer._FLUSH_EVERY = 1; skip = writer.BetonWriter.add\n"
        "def slow(self, *given):\n    skip(self, *given); time.sleep(0.2)\n"
        "writer.BetonWriter.add = slow\n"
        "convert.convert([Path(p) for p in sys.argv[2:]], Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", program, str(out), *map(str, sources)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    journal, deadline = tmp_path / "out.beton.partial.jsonl", time.monotonic() + 60
    while not journal.exists() or len(journal.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(journal.read_text().splitlines()) - 1
    assert 0 < kept < 24
    with pytest.raises(UserError, match="other images"):
        convert(sources[:1], out, ConvertOptions(resume=True, subset=0.5))
    done: list[int] = []
    convert(sources, out, ConvertOptions(resume=True), lambda now, total: done.append(now))
    assert done[0] > kept - 1
    convert(sources, tmp_path / "whole.beton")
    assert out.read_bytes() == (tmp_path / "whole.beton").read_bytes()
