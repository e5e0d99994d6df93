"""Semi-supervised learning, transfer and probes on real images: a part of CIFAR-10."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from data_pipeline.beton.convert import convert
from data_pipeline.beton.sources import list_images
from data_pipeline.sampling.order import class_subset
from mokd.evaluation.cache import open_features
from mokd.evaluation.entry import evaluate
from mokd.evaluation.linear import Standardised
from mokd.evaluation.request import Request
from mokd.evaluation.results import Evaluation
from mokd.runs.files import read_json
from mokd.runs.run_directory import RunDirectory
from tests.support import RESNET, ROOT, tiny_config

ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
PER_CLASS = {"train": 300, "test": 100}
# as CIFAR-10 is usually learned: no smaller crops than these
SETTINGS = {"evaluation__resize_px": 32, "evaluation__crop_px": 32, "evaluation__area_scale": [0.5, 1.0]}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first images of every class, `train` and `test`, and betons of them."""
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE} is missing")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            path = Path(member.name)
            if path.suffix == ".jpg" and int(path.stem) < PER_CLASS[path.parts[0]]:
                archive.extract(member, folder, filter="data")
    for split in PER_CLASS:
        convert([folder / split], folder / f"{split}.beton")
    return folder


def run_of(path: Path, cifar: Path, **changes: Any) -> RunDirectory:
    data = {"evaluation__train": str(cifar / "train.beton"), "evaluation__test": str(cifar / "test.beton")}
    config = tiny_config(cifar / "train.beton", branches=[RESNET], **data, **SETTINGS, **changes)
    return RunDirectory.create(path, config)


def ask(run: RunDirectory, task: str, *overrides: str, **changes: Any) -> Evaluation:
    request = Request(run.path, task, network="scratch", overrides=overrides, **changes)
    evaluation, _ = evaluate(request, 1)
    assert evaluation is not None
    return evaluation


def test_all_labels_teach_more_than_some(cifar: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", cifar)
    settings = ("evaluation.semi.fractions=[0.01, 1.0]", "evaluation.semi.epochs=6", "evaluation.semi.batch=64")
    evaluation = ask(run, "semi", *settings)
    few, all_ = evaluation.results
    assert (few["labels"], all_["labels"]) == (30, 3000)
    assert (few["headline"], all_["headline"]) == (False, True)
    assert all_["top1"] > 20.0  # chance is 10
    assert all_["top1"] > few["top1"]


def test_transfer_reads_betons_and_folders_alike(cifar: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", cifar)
    settings = ("evaluation.transfer.epochs=2", "evaluation.transfer.batch=64", "data.workers=1")
    betons = ask(run, "transfer", *settings, train=cifar / "train.beton", test=cifar / "test.beton")
    folders = ask(run, "transfer", *settings, train=cifar / "train", test=cifar / "test", name="folders")
    (one,), (other,) = betons.results, folders.results
    assert one["labels"] == other["labels"] == 3000
    assert one["top1"] > 13.0
    # the loaders' pixels differ by rounding alone
    assert abs(one["top1"] - other["top1"]) < 5.0


def test_linear_is_within_0_3_points_of_a_converged_logistic_regression(cifar: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", cifar)
    found = ask(run, "linear").record("resnet")["top1"]
    parts = {}
    for place in (run.evaluations / "features").iterdir():
        features = open_features(place)
        parts[features.size] = features
        assert read_json(place / "index.json")["reading"] == "pooled"  # type: ignore[index]
    scale = Standardised(parts[3000])
    train, test = (scale(parts[n].take(np.arange(n))).numpy() for n in (3000, 1000))
    theirs = LogisticRegression(C=1e4, max_iter=5000, tol=1e-6).fit(train, np.arange(3000) // 300)
    assert found == pytest.approx(100.0 * theirs.score(test, np.arange(1000) // 100), abs=0.3)


def test_parts_of_the_labels_are_balanced_and_a_function_of_the_seed(cifar: Path) -> None:
    labels = np.repeat(np.arange(5), [200, 100, 50, 10, 1])
    ids = class_subset(labels, 0.1, 3)
    assert np.bincount(labels[ids]).tolist() == [20, 10, 5, 1, 1]
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert np.array_equal(ids, class_subset(labels, 0.1, 3))
    assert not np.array_equal(ids, class_subset(labels, 0.1, 4))
    # the converter's subset is the same one
    listing, kept = list_images([cifar / "test"]), list_images([cifar / "test"], 0.05, seed=7)
    ids = class_subset(np.asarray(listing.labels), 0.05, 7)
    assert list(kept.paths) == [listing.paths[i] for i in ids]
    assert torch.tensor(kept.labels).bincount().tolist() == [5] * 10
