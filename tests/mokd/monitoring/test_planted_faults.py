"""Every monitor finds its planted fault within 50 steps of a real tiny training, and says nothing of a healthy one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.loaders.build import build_loader
from mokd.config import RunConfig
from mokd.distributed.local_ranks import supervise
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.monitoring.alarms import Rules
from mokd.monitoring.monitors import Monitors, OfRank
from mokd.objectives.base import build_objective
from mokd.objectives.branch import Branch
from mokd.parallel.build import build_branch
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from mokd.training.step import TrainingStep
from tests.programs.train_faulty import dead, one_direction, rows_of, same_features
from tests.support import CONTRASTIVE, RESNET, VIT, tiny_config

CPU = torch.device("cpu")
STEPS = 50


def calm(beton: Path, **changes: Any) -> RunConfig:
    """A tiny run that learns: with the rates of `tiny` the targets of the ResNet are uniform after 40 steps."""
    resnet, vit = copy.deepcopy(RESNET), copy.deepcopy(VIT)
    for branch, rate in ((resnet, 0.05), (vit, 1e-3)):
        branch["optimizer"]["lr"] = rate
        branch["mlp_head"]["batch_norm"] = True
    steady = {"optim__epochs": 10, "optim__teacher_momentum": [0.95, 1.0], "logging__alarms": {"from_step": 0}}
    return tiny_config(beton, **{"branches": [resnet, vit], **steady, **changes})


def alarms_of(config: RunConfig, plant: Callable[[dict[str, Branch]], None], wanted: str = "") -> list[str]:
    """The alarms of 50 steps, or of those up to the wanted one."""
    shape = {"seed": config.seed, "rank": 0, "world_size": 1, "global_batch": config.optim.global_batch}
    loader = build_loader(config.data, config.views, **shape, device=CPU, dtype=torch.float32)
    objective, per_epoch = build_objective(config, CPU), loader.steps_per_epoch
    branches = [
        build_branch(config, b, objective, CPU, images_per_rank=config.optim.global_batch, epoch_steps=per_epoch)
        for b in config.branches
    ]
    plant({branch.name: branch for branch in branches})
    training = TrainingStep(config, branches, objective, StopRequest(), Ranks(), CPU, per_epoch)
    monitors, rules = Monitors(config, Ranks(), CPU), Rules(config, per_epoch)
    found: list[str] = []
    step = 0
    try:
        for epoch in range(STEPS // per_epoch):
            for batch in loader.epoch(epoch):
                done = training.run(step, batch.views, epoch, measure=True)
                step += 1
                shown = monitors.collect([b.name for b in branches], done.losses, done.updates, OfRank(0.0, 0.0))
                assert shown is not None
                record = {"step": step, "images_per_second": 1.0, **shown.measured().values}
                found += [alarm.alarm for alarm in rules.observe(record)]
                if wanted in found:
                    return found
    finally:
        loader.close()
    return found


@pytest.mark.parametrize("changes", [{}, CONTRASTIVE], ids=["dino", "contrastive"])
def test_a_healthy_run_raises_no_alarm(changes: dict[str, Any], beton: Path) -> None:
    assert alarms_of(calm(beton, **changes), lambda branches: None) == []


FAULTS: dict[str, tuple[Callable[[dict[str, Branch]], None], dict[str, Any]]] = {
    "targets_constant/vit": (lambda branches: rows_of(1.0, branches["vit"]), {}),
    "entropy_saturated/resnet": (lambda branches: rows_of(0.0, branches["resnet"]), {}),
    "entropy_collapsed/vit/t_head": (lambda branches: rows_of(20.0, branches["vit"]), {}),
    "dead_branch/vit": (lambda branches: dead(branches["vit"]), {}),
    "feature_rank/vit": (lambda branches: one_direction(branches["vit"]), {}),
    "feature_spread/vit": (lambda branches: same_features(branches["vit"]), {}),
    "center_frozen/resnet": (lambda branches: None, {"objective__center_momentum": 1.0}),
    "cross_dominates/vit": (lambda branches: None, {"branches__weight": 100.0}),
}


@pytest.mark.parametrize("alarm", FAULTS)
def test_planted_faults_are_found(alarm: str, beton: Path) -> None:
    plant, changes = FAULTS[alarm]
    config = calm(beton, **{key: value for key, value in changes.items() if key != "branches__weight"})
    if "branches__weight" in changes:
        heavy = [branch.model_copy(update={"weight": changes["branches__weight"]}) for branch in config.branches]
        config = config.model_copy(update={"branches": tuple(heavy)})
    assert alarm in alarms_of(config, plant, alarm)


@pytest.mark.parametrize("fault", ["dead_branch/vit", "feature_spread/resnet"])
def test_planted_faults_are_found_in_the_contrastive_objective(fault: str, beton: Path) -> None:
    plants = {"dead_branch/vit": ("vit", dead), "feature_spread/resnet": ("resnet", same_features)}
    name, plant = plants[fault]
    assert fault in alarms_of(calm(beton, **CONTRASTIVE), lambda branches: plant(branches[name]), fault)


@pytest.mark.parametrize(("fault", "alarm"), [("slow_rank=0.7", "slow_rank"), ("starving_loader=1.5", "data_wait")])
def test_a_slow_rank_and_a_starving_loader_are_found(fault: str, alarm: str, beton: Path, tmp_path: Path) -> None:
    # a step itself takes longer where other tests run beside this one
    limits = {"patience": 2, "data_wait": 0.2, "slow_rank": 0.1}
    run = RunDirectory.create(tmp_path / "run", calm(beton, optim__max_steps=4, logging__alarms=limits))
    assert supervise([sys.executable, "-m", "tests.programs.train_faulty", str(run.path), fault], 2) == EXIT_DONE
    found = {line["alarm"]: line for line in read_metrics(run.alarms_file)}
    assert alarm in found
    if alarm == "slow_rank":
        assert found[alarm]["advice"].startswith("rank 1 takes longer")
    newest = [record for record in read_metrics(run.metrics_file) if "images_seen" in record][-1]
    assert newest["alarms"] >= 1
    if alarm == "data_wait":
        assert newest["data_wait_fraction"] > 0.2
