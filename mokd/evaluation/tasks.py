"""The tasks by name: which data they take, which settings they follow, and what carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mokd.config import RunConfig
from mokd.distributed import Ranks
from mokd.evaluation.answers import Outcome
from mokd.evaluation.data import LabelledSet, check_neighbours, open_pair
from mokd.evaluation.frozen import knn_task
from mokd.evaluation.subjects import Subject

TASKS = ("knn",)


def place_data(raw: dict[str, Any], task: str, train: Path | None, test: Path | None) -> None:
    """Puts the data sets that a command was given where the configuration has those of a task."""
    section = raw.setdefault("evaluation", {})
    for key, path in (("train", train), ("test", test)):
        if path is not None:
            section[key] = str(path)


def open_data(config: RunConfig, task: str) -> tuple[LabelledSet, LabelledSet]:
    """The training and test set of a task, checked."""
    train, test = open_pair(config.evaluation, config.data.backend)
    if task == "knn":
        check_neighbours(config.evaluation.knn.k, train)
    return train, test


def settings(config: RunConfig, task: str) -> dict[str, Any]:
    """What a task's results follow from, beside weights and data."""
    section = config.evaluation.model_dump(mode="json")
    images = config.views.model_dump(mode="json", include={"mean", "std"})
    return {**images, **{key: section[key] for key in ("resize_px", "crop_px", task)}}


def run(
    task: str,
    subjects: Sequence[Subject],
    train: LabelledSet,
    test: LabelledSet,
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
    directory: Path,
) -> list[Outcome]:
    """Carries a task out for several networks; all ranks call it. `directory` is where features and states are kept."""
    return knn_task(subjects, train, test, config, ranks, device, directory)
