"""A rank's step of the headline configuration on fake CUDA tensors: nothing waits, types, devices, launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mokd.config import RunConfig, load_config
from mokd.objectives.branch import BranchLoss
from mokd.optim.precision import autocast
from tests.gpu.fake_cuda import CUDA, FakeStep, Launches, fake_ranks, fake_step
from tests.support import ROOT

IMAGES, WORLD, EPOCH = 16, 16, 40  # 4 nodes of 4 GPUs; past the freeze and the warm-ups
RECORD = Path(__file__).with_name("launches.json")


def forward(step: FakeStep, config: RunConfig, seen: Launches | None = None) -> tuple[dict[str, int], list[BranchLoss]]:
    """Launches of teachers and branches, and the losses."""
    counts = [0]

    def count() -> int:
        counts.append(sum(seen.operations.values()) if seen else 0)
        return counts[-1] - counts[-2]

    with autocast(config.precision, CUDA):
        taught = step.objective.teach(step.branches, step.views, EPOCH)
    found, losses = {"teachers": count()}, []
    for branch in step.branches:
        with autocast(config.precision, CUDA):
            losses.append(step.objective.loss(branch, step.branches, taught, step.views, EPOCH))
        found[branch.name] = count()
    step.objective.commit()
    return found, losses


def test_forward_and_losses_never_wait_and_stay_within_their_launches() -> None:
    """A host read raises on a fake tensor. launches.json is the budget: fewer launches are welcome, and recorded."""
    config = load_config(ROOT / "configs" / "vit_s_resnet50.yaml")
    record = json.loads(RECORD.read_text())
    with fake_ranks(WORLD), fake_step(config, IMAGES) as step:
        forward(step, config)  # brings constants to the device, once
        with Launches() as seen:
            found, losses = forward(step, config, seen)
    for loss in losses:
        assert (loss.total.dtype, loss.total.device) == (torch.float32, CUDA)
        assert all(term.device == CUDA for term in loss.terms.values())
    assert not seen.elsewhere
    # every product with rows, weights or prototypes takes half precision; one in fp32 sums up the terms' values
    exact = {key: count for key, count in seen.products.items() if key[1] == torch.float32}
    assert not exact, exact
    assert seen.products["mm", torch.bfloat16] > 0
    # one gather for each BatchNorm of ResNet-50 and each of 3 passes: the teacher's, and two sizes of student crops
    assert seen.collectives["_allgather_base_"] == 53 * 3
    for part, launches in found.items():
        assert launches <= record["forward"][part], (part, launches)
    assert sum(found.values()) > 0.8 * sum(record["forward"].values()), "far below the record: record it anew"


def test_a_host_read_is_noticed() -> None:
    with FakeTensorMode():
        loss = torch.ones(2, device=CUDA).sum()
        with pytest.raises(DataDependentOutputException):
            float(loss)
