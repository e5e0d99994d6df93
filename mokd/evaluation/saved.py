"""Evaluation of a run's newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline import schema
from data_pipeline.errors import UserError
from data_pipeline.loader import count_samples
from mokd import checkpoint, state
from mokd.backbones import Backbone, build_backbone
from mokd.config import BranchConfig, RunConfig
from mokd.distributed import Ranks, pick_device
from mokd.evaluation.run import knn_of, records
from mokd.files import replace_json
from mokd.run_directory import RunDirectory

TASKS = ("knn",)
NETWORKS = ("teacher", "student")


def evaluate_run(
    directory: Path, *, task: str, network: str, train: Path | None, test: Path | None, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Records of one task for every branch, also kept under the run's `eval/`. UserError without a checkpoint."""
    _one_of("--task", task, TASKS)
    _one_of("--network", network, NETWORKS)
    run = RunDirectory.open(directory)
    raw = schema.apply_overrides(schema.read_yaml(run.config_file), overrides)
    for key, path in (("train", train), ("test", test)):
        if path is not None:
            raw["evaluation"][key] = str(path)
    config = schema.validate(RunConfig, raw, str(run.config_file))
    for key, path in (("train", config.evaluation.train), ("test", config.evaluation.test)):
        if path is None:
            raise UserError(f"{run.config_file}: evaluation.{key} is not set; give --{key} BETON")
        count_samples(path, config.data.backend)
    found = checkpoint.newest(run)
    if found is None:
        raise UserError(f"{directory}: has no complete checkpoint yet")
    device = pick_device(Ranks())
    backbones = [load_backbone(found, branch, config, network).to(device) for branch in config.branches]
    accuracies = knn_of(backbones, config, Ranks(), device)
    results = [
        record
        for branch, per_branch in zip(config.branches, accuracies, strict=True)
        for record in records(branch.name, network, found.step, per_branch)
    ]
    run.evaluations.mkdir(exist_ok=True)
    replace_json(run.evaluations / f"{task}-{network}-step-{found.step}.json", {"results": results})
    return results


def load_backbone(found: checkpoint.Checkpoint, branch: BranchConfig, config: RunConfig, network: str) -> Backbone:
    """A branch's student or teacher backbone from a checkpoint."""
    tensors = state.network_tensors(found, branch.name, network)
    with torch.random.fork_rng():
        backbone = build_backbone(branch, config.views.global_crops.size_px, drop_path=0.0, images_per_rank=1)
    prefix = "backbone."
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return backbone


def _one_of(option: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise UserError(f"{option}: given '{given}', expected {' or '.join(allowed)}")
