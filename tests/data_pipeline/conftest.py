"""Small data sets for the tests of the loaders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.config import CropConfig, ViewsConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs of different sizes in 3 classes, smooth enough for JPEG to be close to them."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(24):
        width, height = generator.integers(60, 140, 2)
        coarse = generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        path = folder / f"class_{index % 3}" / f"{index:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=90)
    return folder


@pytest.fixture(scope="session")
def beton(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as a beton."""
    path = tmp_path_factory.mktemp("beton") / "pictures.beton"
    convert([picture_folder], path, ConvertOptions(workers=2))
    return path


@pytest.fixture
def own_beton(picture_folder: Path, tmp_path: Path) -> Path:
    """A beton that a test may damage."""
    path = tmp_path / "own.beton"
    convert([picture_folder], path, ConvertOptions(workers=2))
    return path


@pytest.fixture(scope="session")
def imagenet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few ImageNet pictures; skips where they are not at hand."""
    archive = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} beside the checkout")
    import tarfile

    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][::8]
        tar.extractall(folder, members, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="session")
def small_views() -> ViewsConfig:
    """Views that are quick to cut and of every kind."""
    return ViewsConfig(
        global_crops=CropConfig(
            count=2, size_px=40, area_scale=(0.25, 1.0), blur_probability=(1.0, 0.3), solarize_probability=(0.0, 0.5)
        ),
        local_crops=CropConfig(count=3, size_px=20, area_scale=(0.05, 0.25), blur_probability=(0.5,)),
    )
