"""The sections `data:` and `views:` of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.core.schema import PositiveFloat, PositiveInt, Probability, StrictModel

Interval = tuple[float, float]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_CHANNELS = 64  # kMaxChannels of native/kernels.h


class CropConfig(StrictModel):
    """One kind of random resized crop: how many views, their side in pixels, and how each may be changed.

    A probability given as a list has one entry per view of the group; one entry serves all of them.
    """

    count: Annotated[int, Field(ge=0, description="views of this kind")]
    size_px: Annotated[PositiveInt, Field(description="side of a view")]
    area_scale: Annotated[Interval, Field(description="part of the image's area that a crop covers, [least, most]")]
    blur_probability: Annotated[
        tuple[Probability, ...], Field(description="of a Gaussian blur, for each view or one for all")
    ]
    solarize_probability: Annotated[
        tuple[Probability, ...], Field(description="of solarisation, for each view or one for all")
    ] = (0.0,)

    @model_validator(mode="after")
    def _consistent(self) -> CropConfig:
        low, high = self.area_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"area_scale {list(self.area_scale)}: expected 0 < low <= high <= 1")
        for key in ("blur_probability", "solarize_probability"):
            entries = len(getattr(self, key))
            if entries not in (1, self.count):
                raise ValueError(f"{key}: expected 1 entry or one per view ({self.count}), given {entries}")
        return self


class JitterConfig(StrictModel):
    """Colour jitter as torchvision defines it, its four operations in random order."""

    probability: Annotated[Probability, Field(description="that a view's colours are changed at all")] = 0.8
    brightness: Annotated[float, Field(ge=0.0, le=1.0, description="largest change of brightness")] = 0.4
    contrast: Annotated[float, Field(ge=0.0, le=1.0, description="largest change of contrast")] = 0.4
    saturation: Annotated[float, Field(ge=0.0, le=1.0, description="largest change of saturation")] = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5, description="largest turn of the hue, in full circles")] = 0.1


class ViewsConfig(StrictModel):
    """Multi-crop: the views cut from every image. The defaults are the paper's."""

    global_crops: CropConfig = CropConfig(
        count=2,
        size_px=224,
        area_scale=(0.25, 1.0),
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    )
    local_crops: CropConfig = CropConfig(count=8, size_px=96, area_scale=(0.05, 0.25), blur_probability=(0.5,))
    aspect_ratio: Annotated[Interval, Field(description="width over height of a crop, [least, most]")] = (3 / 4, 4 / 3)
    flip_probability: Annotated[Probability, Field(description="of a horizontal flip")] = 0.5
    jitter: JitterConfig = JitterConfig()
    grey_probability: Annotated[Probability, Field(description="that a view loses its colours")] = 0.2
    blur_radius_px: Annotated[Interval, Field(description="standard deviation of the blur, [least, most]")] = (0.1, 2.0)
    solarize_threshold: Annotated[
        int, Field(ge=0, le=255, description="grey level from which solarisation inverts")
    ] = 128
    mean: Annotated[tuple[float, ...], Field(description="of each channel, subtracted (images are 0 to 1)")] = (
        IMAGENET_MEAN
    )
    std: Annotated[tuple[float, ...], Field(description="of each channel, divided by")] = IMAGENET_STD

    @model_validator(mode="after")
    def _consistent(self) -> ViewsConfig:
        low, high = self.aspect_ratio
        if not 0.0 < low <= high:
            raise ValueError("aspect_ratio: expected 0 < low <= high")
        if not 0.0 < self.blur_radius_px[0] <= self.blur_radius_px[1]:
            raise ValueError("blur_radius_px: expected 0 < low <= high")
        if not self.std or min(self.std) <= 0.0:
            raise ValueError("std: every entry must be positive")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} entries, std {len(self.std)}: expected one per channel in both"
            )
        return self

    @property
    def channels(self) -> int:
        """Channels of a view."""
        return len(self.mean)

    @property
    def count(self) -> int:
        """Views per image, global ones first."""
        return self.global_crops.count + self.local_crops.count

    @property
    def groups(self) -> tuple[CropConfig, ...]:
        """The groups of equal size that have views, in view order."""
        return tuple(group for group in (self.global_crops, self.local_crops) if group.count)


class DataConfig(StrictModel):
    """Where the training images are and how they are read."""

    train: Annotated[Path, Field(description="training images: a beton, or with torchvision a folder")]
    channels: Annotated[
        int, Field(ge=1, le=MAX_CHANNELS, description="3: RGB; 1: grey; another number: as converted with --channels")
    ] = 3
    backend: Annotated[
        Literal["ffcv", "torchvision"], Field(description="ffcv, or torchvision where FFCV is not installed")
    ] = "ffcv"
    order: Annotated[
        Literal["permutation", "blocks"],
        Field(description="permutation: any image after any; blocks: for data sets larger than memory"),
    ] = "permutation"
    workers: Annotated[int, Field(ge=1, description="decoding threads (ffcv) or processes (torchvision) per rank")] = 8
    batches_ahead: Annotated[int, Field(ge=1, description="batches that are prepared ahead")] = 3
    batch_timeout_seconds: Annotated[
        PositiveFloat, Field(description="without a batch, after which the loader is taken for dead")
    ] = 120.0
    limit: Annotated[PositiveInt | None, Field(description="use only so many samples: a fixed random part")] = None


def check_channels(data: DataConfig, views: ViewsConfig) -> None:
    """Raises ValueError where the views are made for another number of channels than the images have."""
    n = data.channels
    if views.channels != n:
        raise ValueError(
            f"views.mean has {views.channels} entries, data.channels is {n}: expected one per channel in views.mean "
            f"and views.std; `mokd convert --statistics {data.train} --channels {n}` computes them"
        )
    colour = {
        "views.jitter.saturation": views.jitter.saturation,
        "views.jitter.hue": views.jitter.hue,
        "views.grey_probability": views.grey_probability,
    }
    if n != 3 and (given := [key for key, value in colour.items() if value]):
        raise ValueError(f"{', '.join(given)}: expected 0, colours have no meaning for {n} channel{'s' * (n > 1)}")
