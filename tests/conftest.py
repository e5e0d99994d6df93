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


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of the hub and of torch in `tmp_path`, and no way to anything that is not in them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return tmp_path
