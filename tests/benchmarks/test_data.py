"""The data benchmark on folders of few, equally named and small pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.data import _repeated
from data_pipeline.core.errors import UserError


def test_few_pictures_are_repeated_whatever_they_are_called(tmp_path: Path) -> None:
    for folder in ("x/a", "y/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (300, 250)).save(tmp_path / folder / "1.jpg")
    links = sorted(_repeated(tmp_path, tmp_path / "out", 5).rglob("*.jpg"))
    assert len(links) == 5
    assert {link.resolve() for link in links} == {tmp_path / "x" / "a" / "1.jpg", tmp_path / "y" / "a" / "1.jpg"}


def test_small_pictures_are_refused_for_what_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (48, 60)).save(tmp_path / "1.jpg")
    with pytest.raises(UserError, match=r"its pictures are of about 48 px, views of 224 px, .* choose larger ones"):
        _repeated(tmp_path, tmp_path / "out", 5)
