"""The configuration's evaluation section: data and protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.core.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StrictModel


class KnnConfig(StrictModel):
    """Weighted k-nearest-neighbour classification."""

    k: Annotated[tuple[PositiveInt, ...], Field(description="neighbours; each is reported")] = (10, 20, 30)
    temperature: Annotated[PositiveFloat, Field(description="of the neighbours' weights")] = 0.07

    @property
    def headline(self) -> int:
        """The k that stands for all: 20, as published, or the first."""
        return 20 if 20 in self.k else self.k[0]


class LinearConfig(StrictModel):
    """Linear classifiers on frozen features: SGD with momentum 0.9, no decay, cosine; all rates in one pass."""

    epochs: Annotated[PositiveInt, Field(description="of the classifier's training")] = 100
    batch: Annotated[PositiveInt, Field(description="images of a step")] = 256
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, description="for a batch of 256")] = (
        *(0.001, 0.003, 0.01, 0.03),
        *(0.1, 0.3, 1.0, 3.0, 10.0),
    )
    augment: Annotated[
        bool,
        Field(description="random crops and flips, a backbone pass every epoch; else standardised features, one pass"),
    ] = False
    last_blocks: Annotated[
        PositiveInt | None,
        Field(description="class tokens of so many blocks of a transformer; default: 1 from width 768 on, else 4"),
    ] = None
    patch_mean: Annotated[
        bool, Field(description="of a transformer: also the mean of the last block's patch tokens")
    ] = False


class RatesConfig(StrictModel):
    """Peak rates for a batch of 256, and decay. A layer's rate is `layer_decay` times that of the one above it."""

    lr: Annotated[PositiveFloat, Field(description="of the backbone's last layer")]
    head_lr: Annotated[PositiveFloat, Field(description="of the classifier; of all layers of an untrained network")]
    weight_decay: Annotated[NonNegativeFloat, Field(description="of all weights")] = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0, description="a layer's rate over that of the one above")] = 1.0


class FinetuneConfig(StrictModel):
    """Training of a whole backbone with a linear classifier on labels: random crops and flips, cosine to 0."""

    epochs: Annotated[PositiveInt, Field(description="of training with labels")] = 50
    batch: Annotated[PositiveInt, Field(description="of all ranks; at most the images that there are")] = 256
    warmup_epochs: Annotated[NonNegativeFloat, Field(description="of the rates, linear")] = 1.0
    optimizer: Annotated[
        Literal["sgd", "adamw"] | None, Field(description="default: adamw for transformers, sgd for others")
    ] = None
    sgd: RatesConfig = RatesConfig(lr=0.02, head_lr=0.2)
    adamw: RatesConfig = RatesConfig(lr=5.0e-4, head_lr=5.0e-3, weight_decay=0.05, layer_decay=0.75)
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0, description="stochastic depth of the backbone")] = 0.0


class SemiConfig(FinetuneConfig):
    """Fine-tuning on a class-balanced part of the labels."""

    fractions: Annotated[
        tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...],
        Field(min_length=1, description="of the labels; each is reported"),
    ] = (0.01, 0.1)


class TransferConfig(FinetuneConfig):
    """Fine-tuning on another labelled data set."""

    train: Annotated[Path | None, Field(description="the other data set's training images")] = None
    test: Annotated[Path | None, Field(description="and its test images")] = None


class EvaluationConfig(StrictModel):
    """Labelled data and protocol of the evaluations; without `train` and `test` nothing runs while training."""

    train: Annotated[Path | None, Field(description="labelled images that the classifiers learn from")] = None
    test: Annotated[Path | None, Field(description="labelled images that they are tested on")] = None
    every_epochs: Annotated[PositiveInt | None, Field(description="evaluate while training, and at step 0")] = None
    train_limit: Annotated[PositiveInt | None, Field(description="use only so many images, a fixed random part")] = None
    test_limit: Annotated[PositiveInt | None, Field(description="the same of test")] = None
    monitor_train_limit: Annotated[
        PositiveInt | None, Field(description="of `train`, while training; default: all that `train_limit` leaves")
    ] = None
    resize_px: Annotated[PositiveInt, Field(description="shorter side of an image")] = 256
    crop_px: Annotated[PositiveInt, Field(description="side of the central crop")] = 224
    batch: Annotated[PositiveInt, Field(description="images at a time, of a rank")] = 64
    area_scale: Annotated[tuple[float, float], Field(description="of the random crops of training with labels")] = (
        0.08,
        1.0,
    )
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    semi: SemiConfig = SemiConfig()
    transfer: TransferConfig = TransferConfig()
    probe_images: Annotated[
        NonNegativeInt, Field(description="of `train`, for the linear probe while training; 0: no probe")
    ] = 20000

    @model_validator(mode="after")
    def _complete(self) -> EvaluationConfig:
        if self.every_epochs and not (self.train and self.test):
            raise ValueError("every_epochs: needs both evaluation.train and evaluation.test")
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} is larger than resize_px {self.resize_px}")
        return self
