"""Precision, gradient accumulation and recomputation: what they change, and what they must not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.config import PrecisionConfig, RunConfig
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.monitoring.monitors import Monitors, OfRank
from mokd.objectives.base import build_objective
from mokd.optim.loss_scale import LossScale, any_overflow
from mokd.optim.precision import set_arithmetic
from mokd.parallel.activation_checkpointing import recompute_blocks
from mokd.parallel.build import build_branch
from mokd.training.feasibility import images_per_rank
from mokd.training.step import TrainingStep
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, tiny_config

# Half precision is tried with transformers: gradients of bf16 convolutions of 1 px maps are NaN on some CPUs.
# Networks so small have large gradients, hence the small scale.
TRANSFORMERS = [VIT, THIRD]
SCALE = 1.0

CPU = torch.device("cpu")


def training(**changes: object) -> TrainingStep:
    config: RunConfig = tiny_config(**{"optim__freeze_last_layer_epochs": 0, "optim__warmup_epochs": 0, **changes})
    objective = build_objective(config, CPU)
    images = images_per_rank(config, 1)
    branches = [
        build_branch(config, branch, objective, CPU, images_per_rank=images, epoch_steps=5)
        for branch in config.branches
    ]
    for branch in branches:
        if branch.loss_scale is not None:
            branch.loss_scale.scale = SCALE
    return TrainingStep(config, branches, objective, StopRequest(), Ranks(), CPU, 5)


def views(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v, 8, 3, s, s, generator=generator) for v, s in ((2, 32), (3, 16))]


def parameters(step: TrainingStep, index: int) -> dict[str, torch.Tensor]:
    branch = step.branches[index]
    parts = {"student": branch.student, "teacher": branch.teacher}
    found = {f"{part}.{name}": p for part, network in parts.items() for name, p in network.named_parameters()}
    return {name: t.detach().clone() for name, t in {**found, **branch.optimizer.state_tensors()}.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("overflowing", [0, 1])
def test_an_fp16_overflow_skips_the_step_of_that_branch_only(
    overflowing: int, caplog: pytest.LogCaptureFixture
) -> None:
    step = training(precision__compute="fp16", branches=TRANSFORMERS)
    assert not step.run(0, views(), 0).stopping
    before = [parameters(step, i) for i in range(2)]
    scale = step.branches[overflowing].loss_scale
    assert scale is not None
    scale.scale = 2.0**60  # beyond fp16 for any gradient
    with caplog.at_level(logging.WARNING):
        result = step.run(1, views(1), 0)  # the loss itself is finite: no NonFiniteLossError
    assert all(loss.total.isfinite() for loss in result.losses)
    assert equal(parameters(step, overflowing), before[overflowing])
    assert not equal(parameters(step, 1 - overflowing), before[1 - overflowing])
    name = step.branches[overflowing].name
    assert f"step 2: the gradients of {name} overflow fp16" in caplog.text
    assert scale.scale == 2.0**59
    other = step.branches[1 - overflowing].loss_scale
    assert other is not None
    assert (other.scale, other.steps) == (SCALE, 2)
    scale.scale = SCALE
    step.run(2, views(2), 0)
    assert not equal(parameters(step, overflowing), before[overflowing])


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision_gives_the_gradients_of_fp32_to_its_own_accuracy(compute: str) -> None:
    """fp16 has 8 times the mantissa of bf16, and the scale keeps its gradients from vanishing."""
    taken = {}
    for precision in ("fp32", compute):
        step = training(precision__compute=precision, branches=TRANSFORMERS)
        step._gradients(0, views(), 0)
        taken[precision] = []
        for branch in step.branches:
            scale = branch.loss_scale.scale if branch.loss_scale else 1.0
            gradients = [p.grad.flatten() / scale for p in branch.student.parameters() if p.grad is not None]
            taken[precision].append(torch.cat(gradients))
    for exact, rounded in zip(taken["fp32"], taken[compute], strict=True):
        error = (exact - rounded).norm() / exact.norm()
        assert 0.0 < error < (0.01 if compute == "fp16" else 0.08), error


def test_the_scale_grows_after_an_interval_without_overflow() -> None:
    scale = LossScale(scale=8.0, interval=3)
    for overflowed, expected in ((False, 8), (False, 8), (False, 16), (False, 16), (True, 8), (False, 8), (False, 8)):
        scale.update(overflowed)
        assert scale.scale == expected
    other = LossScale(interval=3)
    saved = scale.state_tensors()
    other.load_state_tensors(lambda key: saved[key])
    assert other == scale


def test_overflow_is_seen_in_any_element_of_any_gradient() -> None:
    fine = [torch.ones(3), torch.zeros(0), torch.full((2, 2), 1e38)]
    for bad in (torch.inf, -torch.inf, torch.nan):
        broken = [*fine, torch.tensor([0.0, bad])]
        assert any_overflow([fine, broken, fine]) == [False, True, False]


def test_recomputed_blocks_give_the_same_bits_and_count_statistics_once() -> None:
    changes = [
        {},
        {"branches": [{**RESNET, "activation_checkpointing": True}, {**VIT, "activation_checkpointing": True}]},
    ]
    ends = []
    for change in changes:
        step = training(**copy.deepcopy(change))
        for number in range(3):
            step.run(number, views(number), 0)
        ends.append({f"{b.name}.{k}": v for b in step.branches for k, v in b.student.state_dict().items()})
    assert any("running_var" in key for key in ends[0])
    assert equal(*ends)


@pytest.mark.parametrize("objective", [{}, CONTRASTIVE], ids=["dino", "contrastive"])
def test_monitors_change_no_bit(objective: dict[str, object]) -> None:
    ends = []
    for measured in (False, True):
        step = training(**copy.deepcopy(objective))
        monitors = Monitors(step.config, Ranks(), CPU)
        for number in range(4):
            given = views(number)[: 1 if objective else 2]
            done = step.run(number, given, 0, measure=measured)
            if measured:
                shown = monitors.collect([b.name for b in step.branches], done.losses, done.updates, OfRank(0.0, 0.0))
                assert shown is not None
                values = shown.measured().values
                assert {
                    "gradient_norm/vit",
                    "update_ratio/vit/backbone",
                    "feature_rank/resnet",
                    "agreement/resnet-vit",
                } <= {*values}
        whole = {f"{b.name}.{k}": v for i, b in enumerate(step.branches) for k, v in parameters(step, i).items()}
        ends.append({**whole, **{k: v.clone() for k, v in step.objective.state_tensors().items()}})
    assert equal(*ends)


def test_recomputation_needs_blocks() -> None:
    with pytest.raises(UserError, match=r"branches.plain.activation_checkpointing: this backbone has no repeated"):
        recompute_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)), "branches.plain")


def test_micro_batches_must_be_equal() -> None:
    with pytest.raises(UserError, match=r"optim.accumulate: 8 images per rank cannot be dealt into 3"):
        training(optim__accumulate=3)


def test_tf32_is_a_switch() -> None:
    for wanted, precision in ((False, "ieee"), (True, "tf32")):
        set_arithmetic(PrecisionConfig(tf32=wanted))
        assert torch.backends.cuda.matmul.fp32_precision == precision
        assert torch.backends.cudnn.conv.fp32_precision == precision
