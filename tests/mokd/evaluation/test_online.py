"""Evaluation while training is written for every evaluation and changes nothing about the training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.core.errors import UserError
from mokd.distributed.local_ranks import supervise, train_locally
from mokd.evaluation.data import open_pair
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config

STEPS = 10  # 5 steps an epoch


def labelled(beton: Path) -> dict[str, str]:
    return {"evaluation__train": str(beton), "evaluation__test": str(beton.with_name("test.beton"))}


def directory(path: Path, beton: Path, **changes: Any) -> RunDirectory:
    sizes = {"evaluation__resize_px": 36, "evaluation__crop_px": 32}
    return RunDirectory.create(path, tiny_config(beton, optim__max_steps=STEPS, **labelled(beton), **sizes, **changes))


def state(run: RunDirectory) -> dict[str, torch.Tensor]:
    folder = run.checkpoints / f"step-{STEPS}"
    return {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_is_the_same_with_evaluations_and_when_it_is_resumed(ranks: int, beton: Path, tmp_path: Path) -> None:
    plain = directory(tmp_path / "plain", beton)
    evaluated = directory(tmp_path / "evaluated", beton, evaluation__every_epochs=1)
    cut = directory(tmp_path / "cut", beton, evaluation__every_epochs=1)
    for run in (plain, evaluated):
        assert train_locally(run.path, ranks) == EXIT_DONE
    program = [sys.executable, "-m", "tests.programs.train_until", str(cut.path), "6"]
    assert supervise(program, ranks) == EXIT_STOPPED
    assert train_locally(cut.path, ranks) == EXIT_DONE
    expected = state(plain)
    for run in (evaluated, cut):
        found = state(run)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
        records = read_metrics(run.metrics_file)
        for key in ("knn_top1", "linear_top1"):
            for branch in ("resnet", "vit"):
                curve = [(r["step"], r[f"eval/{branch}/{key}"]) for r in records if f"eval/{branch}/{key}" in r]
                assert [step for step, _ in curve] == [0, 5, 10]
                assert all(0.0 <= value <= 100.0 for _, value in curve)
    assert not any("linear_top1" in key for record in read_metrics(plain.metrics_file) for key in record)


def test_the_monitor_has_a_limit_of_its_own(beton: Path) -> None:
    def used(**changes: Any) -> tuple[int, int]:
        config = tiny_config(beton, **labelled(beton), **changes)
        sets = (open_pair(config.evaluation, config.data, for_monitor=on)[0].size for on in (True, False))
        return next(sets), next(sets)

    assert used() == (160, 160)
    assert used(evaluation__monitor_train_limit=100) == (100, 160)
    assert used(evaluation__train_limit=120) == (120, 120)  # as before there were two
    assert used(evaluation__train_limit=120, evaluation__monitor_train_limit=100) == (100, 120)
    assert used(evaluation__train_limit=120, evaluation__monitor_train_limit=150) == (120, 120)
    with pytest.raises(UserError, match=r"evaluation\.monitor_train_limit: leaves"):
        used(evaluation__monitor_train_limit=9)


def test_no_probe_is_an_option(beton: Path, tmp_path: Path) -> None:
    run = directory(tmp_path / "run", beton, evaluation__every_epochs=2, evaluation__probe_images=0)
    assert train_locally(run.path, 1) == EXIT_DONE
    keys = set().union(*read_metrics(run.metrics_file))
    assert {"eval/vit/knn_top1", "eval/resnet/knn_top1"} <= keys
    assert not any("linear_top1" in key for key in keys)


def curves(run: RunDirectory) -> list[tuple[int, str, float]]:
    records = read_metrics(run.metrics_file)
    return sorted((r["step"], key, value) for r in records for key, value in r.items() if key.startswith("eval/"))


def test_a_stop_is_answered_with_a_save_and_the_evaluation_is_done_later(beton: Path, tmp_path: Path) -> None:
    """Asked in the last step of an epoch, in the evaluation of the next, and in the last one of all."""
    section = {"evaluation__every_epochs": 1, "evaluation__batch": 16, "checkpoint__every_steps": 4}
    whole = directory(tmp_path / "whole", beton, **section)
    assert train_locally(whole.path, 2) == EXIT_DONE
    cut = directory(tmp_path / "cut", beton, **section)
    for program, at, measured in (
        ("stop_in_evaluation", 0, []),
        ("train_until", 5, [0]),
        ("stop_in_evaluation", 5, [0]),
        ("stop_in_evaluation", 10, [0, 5]),
    ):
        assert supervise([sys.executable, "-m", f"tests.programs.{program}", str(cut.path), str(at)], 2) == EXIT_STOPPED
        assert (cut.read_status()["state"], cut.read_status()["step"]) == ("stopped", at)
        assert at == 0 or (cut.checkpoints / f"step-{at}").is_dir()
        assert sorted({step for step, key, _ in curves(cut) if key.endswith("knn_top1")}) == measured
    assert train_locally(cut.path, 2) == EXIT_DONE
    expected, found = state(whole), state(cut)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert curves(cut) == curves(whole)
