"""Images of other than three channels: the same views by both loaders, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.core.errors import UserError
from data_pipeline.loaders.batch import MultiCropLoader
from data_pipeline.loaders.build import build_eval_loader, build_loader

pytestmark = pytest.mark.filterwarnings("ignore:data.workers")


def multispectral(folder: Path, channels: int, images: int = 12) -> Path:
    """Smooth arrays of 16 bits in three classes, each channel a picture of its own."""
    generator = np.random.default_rng(channels)
    for i in range(images):
        width, height = (int(side) for side in generator.integers(60, 140, 2))
        coarse = generator.integers(0, 256, (channels, 6, 7), dtype=np.uint8)
        planes = [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in coarse]
        path = folder / f"class_{i % 3}" / f"{i:02d}.npy"
        path.parent.mkdir(exist_ok=True, parents=True)
        np.save(path, np.stack([np.asarray(plane) for plane in planes], axis=-1).astype(np.uint16) * 257)
    return folder


def views_of(small_views: ViewsConfig, channels: int, **changes: object) -> ViewsConfig:
    jitter = small_views.jitter.model_copy(update={"saturation": 0.0, "hue": 0.0})
    plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "jitter": jitter, "grey_probability": 0.0}
    return small_views.model_copy(update=plain | changes)


def loader(path: Path, views: ViewsConfig, backend: str) -> MultiCropLoader:
    data = DataConfig(train=path, backend=backend, workers=2, channels=views.channels)  # type: ignore[arg-type]
    return build_loader(data, views, seed=11, rank=0, world_size=1, global_batch=4)


def by_sample(path: Path, views: ViewsConfig, backend: str) -> list[torch.Tensor]:
    found = loader(path, views, backend)
    batches = list(found.epoch(0))
    found.close()
    order = torch.cat([batch.sample_ids for batch in batches]).argsort()
    return [torch.cat([batch.views[g] for batch in batches], dim=1)[:, order] for g in range(len(batches[0].views))]


def farthest(path: Path, other: Path, views: ViewsConfig) -> tuple[float, float]:
    """The mean difference of all views and that of the farthest, in grey levels."""
    fast, slow = by_sample(path, views, "ffcv"), by_sample(other, views, "torchvision")
    every = torch.cat([(a - b).abs().mean(dim=(-3, -2, -1)).flatten() * 255 for a, b in zip(fast, slow, strict=True)])
    assert fast[0].shape[2] == views.channels
    assert fast[0].std() > 0.1
    return float(every.mean()), float(every.max())


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_both_loaders_make_the_same_views(tmp_path, small_views, channels):
    folder, beton = multispectral(tmp_path / "in", channels), tmp_path / "out.beton"
    convert([folder], beton, ConvertOptions(channels=channels))
    none = {"count": 2, "blur_probability": (0.0,), "solarize_probability": (0.0,)}
    plain = views_of(
        small_views,
        channels,
        jitter=small_views.jitter.model_copy(update={"probability": 0.0}),
        global_crops=small_views.global_crops.model_copy(update=none),
        local_crops=small_views.local_crops.model_copy(update=none),
    )
    assert farthest(beton, beton, plain)[1] < 0.5  # the same pixels go in: only rounding differs
    mean, most = farthest(beton, folder, views_of(small_views, channels))
    assert mean < 2.0
    assert most < 6.0


@pytest.mark.parametrize("mode", ["original", "raw"])
def test_both_loaders_make_the_same_grey_views(picture_folder, tmp_path, small_views, mode):
    beton = tmp_path / "out.beton"
    convert([picture_folder], beton, ConvertOptions(channels=1, mode=mode, quality=95))
    mean, most = farthest(beton, beton, views_of(small_views, 1))
    assert mean < 2.0
    assert most < 6.0


@pytest.mark.parametrize("channels", [1, 4])
def test_both_loaders_evaluate_the_same_centres(tmp_path, channels):
    folder, beton = multispectral(tmp_path / "in", channels), tmp_path / "out.beton"
    convert([folder], beton, ConvertOptions(channels=channels, mode="raw"))
    size = {"resize_px": 48, "crop_px": 40, "batch_size": 5, "workers": 2}
    plain = {"mean": (0.1,) * channels, "std": (0.5,) * channels}
    fast, slow = (list(build_eval_loader(beton, backend=b, **size, **plain)) for b in ("ffcv", "torchvision"))
    assert sum(len(batch.labels) for batch in fast) == 12
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert a.images.shape[1:] == (channels, 40, 40)
        assert (a.images - b.images).abs().mean() * 0.5 * 255 < 1.5


def test_other_channels_than_the_images_have_are_refused(tmp_path, small_views, beton):
    with pytest.raises(UserError, match=r"have 3 channels, data.channels is 4: set it to 3, or convert again"):
        loader(beton, views_of(small_views, 4), "ffcv")
    with pytest.raises(UserError, match="have 3 channels"):
        build_eval_loader(beton, resize_px=48, crop_px=40, mean=(0.0,), std=(1.0,), batch_size=5, workers=1)
