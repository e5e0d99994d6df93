"""Successive halving over settings, and the images that settings are chosen by."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trials
from benchmarks.gain import run
from benchmarks.machine import ROOT
from data_pipeline.core.errors import DataError, UserError
from mokd.config import RunConfig
from tests.benchmarks.test_gain import evaluated
from tests.support import mokd, tiny_config

VARIANTS = [(), *((f"branches.vit.weight={weight}",) for weight in (0.5, 0.6, 0.7))]


class Trained:
    """Stands in for hours of training: the gain of a variant is its lambda, less the epochs it was trained for.

    The real thing is below, marked slow.
    """

    def __init__(self, fails: tuple[float, int] | None = None) -> None:
        self.asked: list[tuple[float, int]] = []
        self.names: list[str] = []
        self.fails = fails

    def __call__(self, configs: list[RunConfig], seeds: Any, tasks: Any, *rest: Any) -> Any:
        (config,) = configs
        weight, epochs = config.branches[1].weight, config.optim.epochs
        self.asked.append((weight, epochs))
        self.names.append(config.name)
        if (weight, epochs) == self.fails:
            raise DataError("it has failed")
        found = {
            b: {"solo": 50.0, "pair": 50.0 + g, "gain": g, "ci95": [g - 1, g + 1]}
            for b, g in (("resnet", weight - epochs), ("vit", 5.0))
        }
        self.document = lambda: {"branches": found}
        self.comparisons = {"knn": self}
        return self


def test_the_better_half_goes_on_and_every_trial_is_on_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained, record = Trained(), tmp_path / "trials.jsonl"
    monkeypatch.setattr(trials, "run", trained)
    said: list[str] = []
    best = trials.halving(tiny_config(), VARIANTS, [1, 2, 3], [0, 1], tmp_path, 1, record, said.append)
    assert trained.asked == [(0.1, 1), (0.5, 1), (0.6, 1), (0.7, 1), (0.7, 2), (0.6, 2), (0.7, 3)]
    assert best == [(VARIANTS[3], pytest.approx(-2.3))]
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(tuple(line["variant"]), line["epochs"]) for line in lines[4:]] == [
        (VARIANTS[3], 2),
        (VARIANTS[2], 2),
        (VARIANTS[3], 3),
    ]
    assert lines[1]["branches"]["resnet"] == {"solo": 50.0, "pair": 49.5, "gain": -0.5, "ci95": [-1.5, 0.5]}
    assert (lines[1]["least_gain"], lines[1]["mean_gain"], lines[1]["seeds"]) == (-0.5, 2.25, [0, 1])
    assert {"commit", "processor"} <= lines[0]["machine"].keys()
    again = trials.halving(tiny_config(), VARIANTS, [1, 2, 3], [0, 1], tmp_path, 1, record, said.append)
    assert again == best
    assert len(record.read_text().splitlines()) == len(lines)


def test_what_fails_is_on_record_and_goes_no_further(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained, record = Trained(fails=(0.6, 2)), tmp_path / "trials.jsonl"
    monkeypatch.setattr(trials, "run", trained)
    variants = [VARIANTS[2], VARIANTS[1], ("branches.vit.wieght=3",)]
    best = trials.halving(tiny_config(), variants, [1, 2], [0], tmp_path, 1, record, lambda text: None)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    failed = {(tuple(line["variant"]), line["epochs"]): line["failed"] for line in lines if "failed" in line}
    assert failed.keys() == {(variants[2], 1), (variants[0], 2)}
    assert "did you mean 'weight'" in failed[variants[2], 1]
    assert failed[variants[0], 2] == "it has failed"
    assert best == []


def test_many_settings_still_name_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = Trained()
    monkeypatch.setattr(trials, "run", trained)
    common = tuple(f"objective.ramps.{term}.start={n}" for term in ("cross_search", "cross_mlp") for n in range(5))
    for variant in ((*common, "branches.vit.weight=0.5"), (*common, "branches.vit.weight=0.6")):
        line = trials.trial(tiny_config(), variant, 9, [0], tmp_path, 1, print)
        assert line["variant"] == list(variant)
    for name in set(trained.names):
        (tmp_path / f"{name}-seed-10-solo-resnet").mkdir()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_with_real_training(beton: Path, tmp_path: Path) -> None:
    record = tmp_path / "trials.jsonl"
    variants = [(), ("objective.terms.cross_search=false",)]
    config = evaluated(beton, optim__warmup_epochs=0)
    best = trials.halving(config, variants, [1, 2], [0], tmp_path / "runs", 1, record, print)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["epochs"] for line in lines] == [1, 1, 2]
    assert all("failed" not in line for line in lines), lines
    assert best == [(tuple(lines[2]["variant"]), lines[2]["least_gain"])]
    # both variants share the baselines of their length
    assert len(list((tmp_path / "runs").glob("*solo-vit"))) == 2
    assert run is trials.run


def test_it_ends_after_images_were_read_and_ranks_started(beton: Path, tmp_path: Path) -> None:
    """As when it is stopped while training: the ordinary end of Python has been seen to wait for ever then."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.jpg").touch()
    ends = f"""
import runpy, sys
from pathlib import Path
from data_pipeline.loaders.build import build_eval_loader
from mokd.distributed.local_ranks import supervise
sizes = dict(resize_px=32, crop_px=32, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=8, workers=1)
for batch in build_eval_loader(Path({str(beton)!r}), **sizes):
    pass
supervise([sys.executable, "-c", ""], 1)
sys.argv = ["trials", "--split", {str(tmp_path / "images")!r}, {str(tmp_path / "lists")!r}]
runpy.run_module("benchmarks.trials", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


def test_a_split_deals_out_every_class_and_can_be_converted(tmp_path: Path) -> None:
    from data_pipeline.beton.synthetic import generate

    generate(tmp_path / "images", classes=3, per_class_train=10, per_class_test=0, size_px=24)
    lists = trials.split(tmp_path / "images" / "train", tmp_path / "lists", 0.2)
    found = []
    for path, each in zip(lists, (8, 2), strict=True):
        rows = list(csv.reader(path.open()))
        found.append({file for file, _ in rows})
        assert set(Counter(label for _, label in rows).values()) == {each}
        done = mokd("convert", path, path.with_suffix(".beton"))
        assert done.returncode == 0, done.stderr
        assert f"{3 * each} images, 0 skipped" in done.stdout
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == 30
    with pytest.raises(UserError, match="has no folders"):
        trials.split(tmp_path / "lists", tmp_path / "more", 0.2)
