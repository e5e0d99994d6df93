"""`mokd demo` on a person's own images: few of them, unequal classes, one that is broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.core.errors import UserError
from launcher.cli.console import find_config
from launcher.first_steps.demo import prepare
from launcher.first_steps.own_images import split
from mokd.config import load_config
from mokd.runs.run_directory import RunDirectory
from tests.support import mokd


def picture(path: Path, generator: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 12, 6 and 3 images, one of a single image, and one image that is none."""
    generator, folder = np.random.default_rng(0), tmp_path / "my photos"
    for label, count in (("cats", 12), ("dogs", 6), ("eels", 3), ("fox", 1)):
        for index in range(count):
            picture(folder / label / "deep" / f"{index}.jpg", generator)
    (folder / "cats" / "broken.jpg").write_bytes(b"not an image")
    return folder


def test_every_class_is_trained_on_and_tested(photos: Path, tmp_path: Path) -> None:
    left_out = split(photos, tmp_path / "out")
    parts = {part: sorted(path.name for path in (tmp_path / "out" / part).iterdir()) for part in ("train", "test")}
    assert parts == {"train": ["cats", "dogs", "eels"], "test": ["cats", "dogs", "eels"]}
    links = list((tmp_path / "out").rglob("*.jpg"))
    assert left_out == ["fox"]
    assert len(links) == 22
    assert len({link.resolve() for link in links}) == 22
    assert (tmp_path / "out" / "train" / "eels" / "deep" / "0.jpg").resolve() == photos / "eels" / "deep" / "0.jpg"
    assert split(photos, tmp_path / "out") == left_out
    assert sorted((tmp_path / "out").rglob("*.jpg")) == sorted(links)


def test_images_in_no_classes_are_all_trained_on(photos: Path, tmp_path: Path) -> None:
    assert split(photos / "cats" / "deep", tmp_path / "out") == []
    assert len(list((tmp_path / "out" / "train").iterdir())) == 12
    assert not (tmp_path / "out" / "test").exists()


def test_what_changes_fits_the_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    overrides = prepare(photos, 2, said.append)
    config = load_config(find_config("demo.yaml"), overrides)
    assert config.optim.global_batch == 16  # of 17 images: 4 of 22 are for testing, one is broken
    assert config.evaluation.knn.k == (17,)
    assert f"{photos / 'fox'}: left out, a class of a single image" in said
    assert [line for line in said if line.startswith(f"skipped {photos / 'cats' / 'broken.jpg'}: ")]
    said.clear()
    assert prepare(photos, 2, said.append) == overrides
    assert said == []
    with pytest.raises(UserError, match=r"17 images; the demo needs at least 18 on 9 ranks"):
        prepare(photos, 9, said.append)


def test_it_trains_on_them_and_writes_the_report(photos: Path, tmp_path: Path) -> None:
    ended = mokd("demo", "--data", photos, "--nproc", "1", "optim.epochs=1", "optim.warmup_epochs=0", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("demo-my-photos-")
    assert RunDirectory(run).read_status()["state"] == "done"
    assert "k-NN % before training" in ended.stdout
    assert f"report       runs/{run.name}/report.html" in ended.stdout
    assert "<html" in (run / "report.html").read_text()[:200]
