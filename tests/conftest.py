from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.beton.convert import convert
from data_pipeline.beton.synthetic import generate


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled beton of generated images: 10 classes x 16 for training; `test.beton` beside it with 4 each."""
    folder = tmp_path_factory.mktemp("betons")
    generate(folder / "images", per_class_train=16, per_class_test=4, size_px=48)
    for split in ("train", "test"):
        convert([folder / "images" / split], folder / f"{split}.beton")
    return folder / "train.beton"
