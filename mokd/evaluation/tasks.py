"""The tasks by name: which data they take, which settings they follow, and what carries them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mokd.config import RunConfig
from mokd.evaluation.answers import Outcome
from mokd.evaluation.data import LabelledSet, check_neighbours, check_pair, open_labelled, open_pair
from mokd.evaluation.finetune import finetune_task
from mokd.evaluation.frozen import knn_task
from mokd.evaluation.linear_task import linear_task
from mokd.evaluation.work import Work


def place_data(raw: dict[str, Any], task: str, train: Path | None, test: Path | None) -> None:
    """Puts the data sets that a command was given where the configuration has those of a task."""
    section = raw.setdefault("evaluation", {})
    if task == "transfer":
        section = section.setdefault("transfer", {})
    for key, path in (("train", train), ("test", test)):
        if path is not None:
            section[key] = str(path)


def open_data(config: RunConfig, task: str) -> tuple[LabelledSet, LabelledSet]:
    """The training and test set of a task, checked."""
    section, data = config.evaluation, config.data
    if task == "transfer":
        train = open_labelled("evaluation.transfer.train", section.transfer.train, data.backend, None, data.channels)
        test = open_labelled("evaluation.transfer.test", section.transfer.test, data.backend, None, data.channels)
        check_pair(train, test)
        return train, test
    train, test = open_pair(section, data)
    if task == "knn":
        check_neighbours(section.knn.k, train)
    return train, test


def settings(config: RunConfig, task: str) -> dict[str, Any]:
    """What a task's results follow from, beside weights and data."""
    section = config.evaluation.model_dump(mode="json")
    images = config.views.model_dump(mode="json", include={"mean", "std"})
    for path in ("train", "test"):  # the data are known by their content
        section["transfer"].pop(path)
    section["semi"].pop("fractions")  # each is fine-tuned by itself, and added to those on record
    keys = ["resize_px", "crop_px", task]
    if task != "knn":
        keys.append("area_scale")
        images["seed"] = config.seed
    if task in ("semi", "transfer"):
        images["precision"] = config.precision.compute
    return {**images, **{key: section[key] for key in keys}}


def run(task: str, work: Work) -> list[Outcome]:
    """Carries a task out for several networks; all ranks call it."""
    section = work.config.evaluation
    if task == "knn":
        return knn_task(work)
    if task == "linear":
        return linear_task(work)
    if task == "semi":
        return finetune_task(work, section.semi, section.semi.fractions)
    return finetune_task(work, section.transfer, fractions=(1.0,))
