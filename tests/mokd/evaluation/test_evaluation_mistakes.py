"""What an evaluation refuses, in one line each, before a network runs where that can be known."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.beton.convert import convert
from data_pipeline.core.errors import UserError
from mokd.evaluation import frozen
from mokd.evaluation.entry import evaluate
from mokd.evaluation.request import Request
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config


@pytest.fixture
def run(beton: Path, tmp_path: Path) -> RunDirectory:
    config = tiny_config(
        beton,
        evaluation__train=str(beton),
        evaluation__test=str(beton.with_name("test.beton")),
        evaluation__resize_px=36,
        evaluation__crop_px=32,
    )
    return RunDirectory.create(tmp_path / "run", config)


@pytest.fixture
def images(beton: Path, tmp_path: Path) -> Path:
    """A copy of the images that the betons were made of."""
    shutil.copytree(beton.with_name("images"), tmp_path / "images")
    return tmp_path / "images"


def refusal(run: RunDirectory, *overrides: str, **changes: Any) -> str:
    request = Request(run.path, **{"network": "scratch", "overrides": overrides, **changes})
    with pytest.raises(UserError) as caught:
        evaluate(request, 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arguments(run: RunDirectory) -> None:
    assert "no branch 'cnn'; there are resnet, vit" in refusal(run, branches=("cnn",))
    assert "--task: given 'knnn', expected knn or linear" in refusal(run, task="knnn")
    assert "--network: given 'both'" in refusal(run, network="both")
    assert "--name: given '../../x'" in refusal(run, name="../../x")
    assert "no complete checkpoint" in refusal(run, network="student")
    assert "evaluation.transfer.train: not set; give --train BETON" in refusal(run, task="transfer")
    assert "evaluation.test: not set" in refusal(run, "evaluation.test=null")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_wanted_or_was_promised(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a GPU is wanted, but rank 0 can use none" in refusal(run, "parallel.device=cuda")
    monkeypatch.setenv("MOKD_GPUS_PER_NODE", "1")
    assert "1 GPU was promised here" in refusal(run)
    monkeypatch.setenv("MOKD_GPUS_PER_NODE", "one")
    assert "'one' is not a number" in refusal(run)
    monkeypatch.setenv("MOKD_GPUS_PER_NODE", "1")
    request = Request(run.path, network="scratch", overrides=("parallel.device=cpu", "evaluation.knn.k=[3]"))
    evaluation, status = evaluate(request, 1)
    assert (status, len(evaluation.results if evaluation else [])) == (0, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_local_ranks_take_the_device_of_the_configuration(run: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    request = Request(run.path, network="scratch", overrides=("parallel.device=cuda",))
    assert evaluate(request, 2) == (None, 2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a GPU is wanted, but rank 0 can use none" in line


def test_more_neighbours_than_images(run: RunDirectory) -> None:
    assert "evaluation.knn.k: 161 neighbours" in refusal(run, "evaluation.knn.k=[20, 161]")
    assert "evaluation.knn.k: 30 neighbours, but" in refusal(run, "evaluation.train_limit=29")


def test_classes_that_are_missing_or_others(run: RunDirectory, images: Path, tmp_path: Path) -> None:
    first = sorted((images / "test").iterdir())[0]
    shutil.rmtree(first)
    convert([images / "test"], tmp_path / "nine.beton")
    said = refusal(run, test=tmp_path / "nine.beton")
    assert f"{first.name} (1 differ)" in said
    assert "labels would mean different things" in said
    assert "without images, the first is" in refusal(run, "evaluation.knn.k=[3]", "evaluation.train_limit=9")


def test_only_one_class(run: RunDirectory, images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for folder in sorted((images / split).iterdir())[1:]:
            shutil.rmtree(folder)
        convert([images / split], tmp_path / f"{split}.beton")
    said = refusal(run, "evaluation.knn.k=[3]", train=tmp_path / "train.beton", test=tmp_path / "test.beton")
    assert "holds only one class" in said


def test_a_data_set_that_is_tested_on_itself_is_warned_of(run: RunDirectory, beton: Path) -> None:
    with pytest.warns(UserWarning, match=f"{beton} has the images of {beton}: what is tested has been learned from"):
        evaluate(Request(run.path, network="scratch", test=beton), 1)


def test_images_without_label(run: RunDirectory, images: Path, tmp_path: Path) -> None:
    convert([sorted((images / "test").iterdir())[0]], tmp_path / "flat.beton")
    assert "holds images without label" in refusal(run, test=tmp_path / "flat.beton")


def test_features_that_are_not_finite(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        for number, batch in enumerate(extract(*arguments)):
            if number == 1:
                batch[1][3] = torch.nan
            yield batch

    extract = frozen.extract
    monkeypatch.setattr(frozen, "extract", broken)
    assert "the features of image 67 are not finite; the network has diverged" in refusal(run)
    assert not list((run.evaluations / "features").iterdir())  # whole or not at all


def test_training_is_refused_ahead_for_the_same_reasons(run: RunDirectory, beton: Path) -> None:
    from mokd.training.feasibility import check

    config = tiny_config(
        beton,
        evaluation__every_epochs=1,
        evaluation__train=str(beton),
        evaluation__test=str(beton.with_name("test.beton")),
        evaluation__knn__k=[200],
    )
    with pytest.raises(UserError, match="200 neighbours"):
        check(config, 1)
    itself = config.evaluation.model_copy(update={"test": beton})
    with pytest.warns(UserWarning, match="has the images of"), pytest.raises(UserError, match="200 neighbours"):
        check(config.model_copy(update={"evaluation": itself}), 1)
