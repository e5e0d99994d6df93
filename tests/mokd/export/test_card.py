"""The card of an export: where its weights came from and under which licence, what was measured, how it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from mokd.checkpointing import state
from mokd.checkpointing.storage import publish
from mokd.evaluation.entry import evaluate
from mokd.evaluation.request import Request
from mokd.export.export import export
from mokd.objectives.base import build_objective
from mokd.parallel.build import build_branch
from mokd.runs.first_weights import facts_of
from mokd.runs.run_directory import RunDirectory
from mokd.weights import initial
from tests.support import RESNET, SEED, hub_cache, tiny_config

PX = 32


@pytest.fixture
def run(beton: Path, offline: Path) -> RunDirectory:
    """A small network beside a frozen one from a repository with a licence, at its first step."""
    net = timm.create_model("test_vit", img_size=PX)
    hub_cache(offline / "hub", "somebody/network", model__safetensors=net.state_dict(), config__json={"license": "mit"})
    still = {"name": "still", "backbone": "test_vit", "init": "hub:somebody/network", "frozen": True}
    evaluation = {"train": str(beton), "test": str(beton.with_name("test.beton")), "resize_px": PX, "crop_px": PX}
    config = tiny_config(beton, branches=[RESNET, still], evaluation={**evaluation, "knn": {"k": [3]}}, **SEED)
    run = initial.create_run(offline / "run", config)
    objective = build_objective(config, torch.device("cpu"))
    branches = [
        build_branch(config, branch, objective, torch.device("cpu"), images_per_rank=4, epoch_steps=5)
        for branch in config.branches
    ]
    initial.load(run, config, branches)
    publish(run, 0, 5, state.collect(branches, objective, main=True), {})
    return run


def test_it_tells_sources_licences_and_what_was_measured(run: RunDirectory) -> None:
    before, _ = (next(export(run, name, "timm", "teacher")) for name in ("still", "resnet"))
    own, other = (
        (run.path / "export" / f"{name}-teacher-timm" / "README.md").read_text() for name in ("still", "resnet")
    )
    facts = facts_of(run, run.config().branches[1])
    assert facts is not None
    assert before.difference < 1e-5
    assert f"first weights: repository somebody/network of the hub, SHA-256 {facts['sha256'][:16]}" in own
    assert "The weights it started from have a licence of their own (mit), which goes on to hold." in own
    assert "trained: not here: frozen, together with resnet" in own
    assert "first weights: random" in other
    assert "licence" not in other
    assert "objective seed, together with still" in other
    assert "Not evaluated at this step" in own

    evaluation, _ = evaluate(Request(run.path, "knn"), 1)
    assert evaluation is not None
    list(export(run, "still", "timm", "teacher", replace=True))
    own = (run.path / "export" / "still-teacher-timm" / "README.md").read_text()
    record = evaluation.record("still")
    assert record is not None
    assert f"| knn (k 3) | {evaluation.images} of test.beton | {record['top1']:.2f} |" in own
