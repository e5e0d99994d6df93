"""What an evaluation leaves behind: `<task>-<network>-step-<n>.json` and, beside it, what was predicted for each image.

The `.safetensors` file of the same name holds int64 tensors: `labels` `[M]`, and `[M]` predicted classes under the key
that each record names in `predictions`; rows in the order of the data set, whatever the number of ranks. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipeline.core.errors import UserError
from mokd.runs.files import checksum, read_json, replace_bytes, replace_json

Int64Array = NDArray[np.int64]
LABELS = "labels"
# by task, the field of a record that says under which of the task's settings it was made
SETTINGS = {"knn": "k", "linear": "lr", "semi": "fraction", "transfer": "fraction"}


@dataclass(frozen=True)
class Evaluation:
    """One task's results for the branches of a run, at one step.

    results: a record per branch and setting: `branch`, `network`, `task`, `step`, `top1` and `top5` in percent, the
    setting (`SETTINGS`), `predictions` (a key of the field of that name), and `headline`, true for one record of each
    branch. test: the labelled data set; images: how many of it were used. labels, predictions: `[M]`.
    fingerprints: per branch, of all that its results follow from; protocols: of that without weights and seed.
    """

    task: str
    network: str
    step: int
    checkpoint: str
    test: str
    images: int
    results: list[dict[str, Any]]
    labels: Int64Array
    predictions: dict[str, Int64Array]
    fingerprints: dict[str, str] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)

    def record(self, branch: str, at: float | None = None) -> dict[str, Any] | None:
        """The record of a branch under the setting `at`, or the one that stands for it; None when there is none."""
        own = [r for r in self.results if r["branch"] == branch]
        return next((r for r in own if (r["headline"] if at is None else r.get(SETTINGS[self.task]) == at)), None)

    def document(self) -> dict[str, Any]:
        """What the JSON file holds, and `mokd eval --json` prints."""
        keys = ("task", "network", "step", "checkpoint", "test", "images", "results", "fingerprints", "protocols")
        return {key: getattr(self, key) for key in keys}


def result_path(directory: Path, name: str, network: str, step: int) -> Path:
    """Where the results of a task lie; `name` is the task's, unless the user has given another."""
    return directory / f"{name}-{network}-step-{step}.json"


def write(path: Path, evaluation: Evaluation) -> None:
    """Puts both files in place by rename; the JSON file comes last and holds the checksum of the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({LABELS: evaluation.labels, **evaluation.predictions})
    replace_bytes(path.with_suffix(".safetensors"), content)
    replace_json(path, {**evaluation.document(), "predictions_sha256": checksum(content)})


def read(path: Path) -> Evaluation:
    """A written pair. UserError when it is missing, damaged, or its halves do not belong together."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: no such evaluation, or not whole; make it with `mokd eval`")
    try:
        content = path.with_suffix(".safetensors").read_bytes()
        if checksum(content) != document.pop("predictions_sha256"):
            raise ValueError("checksum")
        predictions = load(content)
        return Evaluation(**document, labels=predictions.pop(LABELS), predictions=predictions)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        raise UserError(f"{path}: its predictions are missing or damaged; evaluate again") from None


def find(path: Path) -> Evaluation | None:
    """`read`, or None where there is nothing whole."""
    try:
        return read(path)
    except UserError:
        return None


def accuracy(labels: Int64Array, top5: Int64Array) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of the most likely classes `[M, up to 5]`, the likeliest first."""
    hits = top5 == labels[:, None]
    return round(100.0 * float(hits[:, 0].mean()), 3), round(100.0 * float(hits.any(axis=1).mean()), 3)


def joined(new: Evaluation, old: Evaluation, branches: Collection[str]) -> Evaluation:
    """`new`, with what `old` says of the same branches under other settings; the largest setting is the headline."""
    setting = SETTINGS[new.task]
    there = {(r["branch"], r[setting]) for r in new.results}
    kept = [r for r in old.results if r["branch"] in branches and (r["branch"], r[setting]) not in there]
    records = sorted([*kept, *new.results], key=lambda r: r[setting])
    largest = {r["branch"]: r[setting] for r in records}
    return replace(
        new,
        results=[{**r, "headline": r[setting] == largest[r["branch"]]} for r in records],
        predictions={**{r["predictions"]: old.predictions[r["predictions"]] for r in kept}, **new.predictions},
    )


def merged(new: Evaluation, old: Evaluation, keep: Collection[str], order: Sequence[str]) -> Evaluation:
    """`new`, with what `old` says of the branches to `keep`; branches come in the given `order`."""
    kept = [r for r in old.results if r["branch"] in keep]
    return replace(
        new,
        results=sorted([*kept, *new.results], key=lambda r: order.index(r["branch"])),
        predictions={**{r["predictions"]: old.predictions[r["predictions"]] for r in kept}, **new.predictions},
        fingerprints={**{branch: old.fingerprints[branch] for branch in keep}, **new.fingerprints},
        protocols={**{branch: old.protocols[branch] for branch in keep if branch in old.protocols}, **new.protocols},
    )
