"""Which backend reads the data."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.loaders import build
from data_pipeline.loaders.torchvision import TorchvisionLoader
from tests.support import tiny_config


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where FFCV is not installed: here it always is, since the other tests need it."""
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "ffcv" else find_spec(name))
    build.usable_backend.cache_clear()
    yield
    build.usable_backend.cache_clear()


@pytest.mark.usefixtures("without_ffcv")
def test_without_ffcv_the_torchvision_loader_takes_over(beton: Path, picture_folder: Path) -> None:
    config = tiny_config(beton)
    assert config.data.backend == "ffcv"
    with pytest.warns(UserWarning, match="FFCV is not installed, the torchvision loader takes over"):
        loader = build.build_loader(config.data, config.views, seed=0, rank=0, world_size=1, global_batch=8)
    assert isinstance(loader, TorchvisionLoader)
    loader.close()
    build.check_path(picture_folder, "ffcv")


def test_with_ffcv_a_folder_is_refused(picture_folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; convert it first"):
        build.check_path(picture_folder, "ffcv")
