"""A rank's step of the headline configuration on fake CUDA tensors: nothing waits, types, devices, launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mokd.config import RunConfig, load_config
from mokd.objectives.branch import BranchLoss
from mokd.optim.precision import autocast
from tests.gpu.fake_cuda import CUDA, EPOCH_STEPS, FakeStep, Launches, backward, fake_ranks, fake_step
from tests.support import ROOT

IMAGES, WORLD, EPOCH = 16, 16, 40  # 4 nodes of 4 GPUs; past the freeze and the warm-ups
RECORD = Path(__file__).with_name("launches.json")


Counts = dict[str, dict[str, int]]


def whole_step(step: FakeStep, config: RunConfig) -> tuple[Counts, list[BranchLoss], dict[str, Launches]]:
    """Launches of every part of a step, by branch; the losses; what was seen in each part."""
    seen = {part: Launches() for part in ("forward", "backward", "update")}
    found: Counts = {part: {} for part in seen}

    def note(part: str, name: str) -> None:
        found[part][name] = sum(seen[part].operations.values()) - sum(found[part].values())

    losses = []
    with seen["forward"]:
        with autocast(config.precision, CUDA):
            taught = step.objective.teach(step.branches, step.views, EPOCH)
        step.objective.remember(taught)
        note("forward", "teachers")
        for branch in step.branches:
            with autocast(config.precision, CUDA):
                losses.append(step.objective.loss(branch, step.branches, taught, step.views, EPOCH))
            note("forward", branch.name)
        step.objective.commit()
    with seen["backward"]:
        for loss, branch in zip(losses, step.branches, strict=True):
            backward(loss.total)
            note("backward", branch.name)
    with seen["update"]:
        for branch in step.branches:
            branch.optimizer.take_gradients(EPOCH * EPOCH_STEPS)
            branch.optimizer.step(EPOCH * EPOCH_STEPS)
            branch.update_teacher(0.996)
            note("update", branch.name)
    return found, losses, seen


def test_a_step_never_waits_and_stays_within_its_launches() -> None:
    """A host read raises on a fake tensor. launches.json is the budget: fewer launches are welcome, and recorded."""
    config = load_config(ROOT / "configs" / "vit_s_resnet50.yaml")
    record = json.loads(RECORD.read_text())
    with fake_ranks(WORLD), fake_step(config, IMAGES) as step:
        whole_step(step, config)  # brings constants to the device and makes the optimisers' states, once
        found, losses, seen = whole_step(step, config)
    for loss in losses:
        assert (loss.total.dtype, loss.total.device) == (torch.float32, CUDA)
        assert all(term.device == CUDA for term in loss.terms.values())
    assert not any(part.elsewhere for part in seen.values())
    # every product with rows, weights or prototypes takes half precision; the terms' few numbers are summed in float64
    for part in seen.values():
        exact = {key: count for key, count in part.products.items() if key[1] == torch.float32}
        assert not exact, exact
    assert seen["forward"].products["mm", torch.bfloat16] > 0
    assert seen["backward"].products["mm", torch.bfloat16] > 0
    # one gather for each BatchNorm of ResNet-50 and each of 3 passes: the teacher's, and two sizes of student crops
    assert seen["forward"].collectives["_allgather_base_"] == 53 * 3
    # and one sum for each of the student's backwards
    assert seen["backward"].collectives == {"allreduce_": 53 * 2}
    assert not seen["update"].collectives
    for part, launches in found.items():
        assert launches.keys() == record[part].keys()
        for name, count in launches.items():
            assert count <= record[part][name], (part, name, count)
        assert sum(launches.values()) > 0.8 * sum(record[part].values()), "far below the record: record it anew"


def test_a_backward_pass_node_by_node_gives_the_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
    scale = nn.Parameter(torch.ones(1))  # broadcast, and used twice

    def loss() -> torch.Tensor:
        first, second = (net(x) * scale).split(4)
        return (first * second + scale).square().sum()

    x, parameters = torch.randn(8, 4), [*net.parameters(), scale]
    backward(loss())
    found = [p.grad for p in parameters]
    for mine, expected in zip(found, torch.autograd.grad(loss(), parameters), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, expected)


def test_a_host_read_is_noticed() -> None:
    with FakeTensorMode():
        loss = torch.ones(2, device=CUDA).sum()
        with pytest.raises(DataDependentOutputException):
            float(loss)
