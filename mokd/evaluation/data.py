"""Labelled data sets as evaluations use them, and everything that can be said of them before a network runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.beton.samples import Samples, open_samples
from data_pipeline.config import DataConfig
from data_pipeline.core.errors import UserError
from data_pipeline.loaders.build import Backend, check_path, usable_backend
from data_pipeline.sampling.order import Int64Array, contiguous_part, subset
from mokd.config.evaluation import EvaluationConfig


@dataclass(frozen=True)
class LabelledSet:
    """The images of a data set that an evaluation uses: sample ids and labels `[n]`, in the data set's order."""

    path: Path
    backend: Backend
    limit: int | None
    ids: Int64Array
    labels: Int64Array
    samples: Samples

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.samples.classes

    @cached_property
    def fingerprint(self) -> str:
        """Of all the data set's images and labels."""
        return self.samples.fingerprint()

    @property
    def size(self) -> int:
        """Images used."""
        return len(self.ids)

    def part(self, rank: int, world_size: int) -> tuple[int, int]:
        """The rows, from and to, that a rank reads; the loader's rule."""
        return contiguous_part(self.size, rank, world_size)


def open_labelled(
    key: str, path: Path | None, backend: Backend, limit: int | None = None, channels: int = 3
) -> LabelledSet:
    """The labelled data set that the configuration's `key` names; a folder of images is read by the reference loader.

    UserError when there is none, or an image has no label.
    """
    if path is None:
        raise UserError(f"{key}: not set; give --{key.rsplit('.')[-1]} BETON")
    backend = "torchvision" if path.is_dir() else usable_backend(backend)
    check_path(path, backend)
    samples = open_samples(path, channels)
    ids = subset(samples.size, limit)
    labels = samples.labels[ids]
    if not samples.classes or (labels < 0).any():
        raise UserError(f"{key}: {path} holds images without label; evaluation needs folders named after classes")
    return LabelledSet(path, backend, limit, ids, labels, samples)


def check_pair(train: LabelledSet, test: LabelledSet, limit_key: str = "train_limit") -> None:
    """UserError unless both sets speak of the same two or more classes, each with images to learn it from.

    limit_key: what has limited the training set.
    """
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes)) or ["another order"]
        raise UserError(
            f"{test.path}: its classes are not those of {train.path}: {odd[0]} ({len(odd)} differ); "
            "labels would mean different things"
        )
    if len(train.classes) < 2:
        raise UserError(f"{train.path}: holds only one class ({train.classes[0]}); there is nothing to tell apart")
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if not counts.all():
        empty = np.flatnonzero(counts == 0)
        raise UserError(
            f"evaluation.{limit_key}: leaves {len(empty)} classes of {train.path} without images, the first is "
            f"'{train.classes[empty[0]]}'; raise it"
        )


def warn_same(train: LabelledSet, test: LabelledSet) -> None:
    """Warns where a data set is tested on itself."""
    if train.fingerprint == test.fingerprint:
        warnings.warn(
            f"evaluation: {test.path} has the images of {train.path}: what is tested has been learned from, which says "
            "nothing of other images",
            stacklevel=2,
        )


def check_neighbours(ks: Sequence[int], train: LabelledSet) -> None:
    """UserError when k neighbours are asked for and there are fewer images."""
    if max(ks) > train.size:
        raise UserError(f"evaluation.knn.k: {max(ks)} neighbours, but {train.path} gives {train.size} images")


def open_pair(
    section: EvaluationConfig, data: DataConfig, *, for_monitor: bool = False
) -> tuple[LabelledSet, LabelledSet]:
    """`evaluation.train` and `evaluation.test`, checked. for_monitor: what is used of them while training."""
    key, limit = "train_limit", section.train_limit
    if for_monitor and section.monitor_train_limit is not None:
        key, limit = "monitor_train_limit", min(section.monitor_train_limit, limit or section.monitor_train_limit)
    train = open_labelled("evaluation.train", section.train, data.backend, limit, data.channels)
    test = open_labelled("evaluation.test", section.test, data.backend, section.test_limit, data.channels)
    check_pair(train, test, key)
    return train, test
