from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.objectives.base import build_objective
from mokd.optim import optimizer as optimizer_module
from mokd.optim.optimizer import BranchOptimizer, clip_each
from mokd.optim.schedules import cosine, warmup_cosine
from tests.support import single_branch, tiny_config

STEPS = 5  # per epoch


@pytest.fixture
def parts() -> tuple:
    config = tiny_config(optim__global_batch=64)
    objective = build_objective(config, torch.device("cpu"))
    branches = [single_branch(objective, config, branch, 4, STEPS) for branch in config.branches]
    return config, branches


def test_every_trained_parameter_is_in_the_group_the_method_says(parts: tuple) -> None:
    _, branches = parts
    for branch in branches:
        placed = {}
        for group in branch.optimizer.torch.param_groups:
            for p in group["params"]:
                assert id(p) not in placed
                placed[id(p)] = group
        for name, p in branch.student.named_parameters():
            if not p.requires_grad:
                assert id(p) not in placed
                continue
            group = placed[id(p)]
            own = branch.config.t_head_group is not None and name.startswith("t_head.")
            assert group["schedule"] == (branch.config.t_head_group if own else branch.config.optimizer), name
            plain = p.ndim == 1 or name.endswith(".bias")
            assert group["decayed"] is (own or not plain), name


def test_rates_scale_with_the_batch_and_the_last_does_not(parts: tuple) -> None:
    _, branches = parts
    optimizer = branches[0].optimizer
    for step in (0, 3, 7, 15):
        optimizer.schedule(step)
        for group in optimizer.torch.param_groups:
            schedule = group["schedule"]
            peak = schedule.lr * 64 / 256
            assert group["lr"] == pytest.approx(warmup_cosine(step, 3 * STEPS, STEPS, peak, schedule.min_lr))
            decay = cosine(step, 3 * STEPS, *schedule.decay_range) if group["decayed"] else 0.0
            assert group["weight_decay"] == pytest.approx(decay)


def test_frozen_last_layers_get_no_decay_and_no_momentum(parts: tuple) -> None:
    _, branches = parts
    for branch in branches:
        before = copy.deepcopy(branch.student.state_dict())
        for step in (STEPS - 2, STEPS - 1, STEPS):
            for p in branch.student.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            branch.optimizer.take_gradients(step)
            branch.optimizer.step(step)
            frozen = step < STEPS  # the first epoch
            for name, p in branch.student.named_parameters():
                if branch.student.is_last_layer(name) and p.requires_grad:
                    assert torch.equal(p, before[name]) is frozen, (step, name)
                    assert bool(branch.optimizer.torch.state.get(p)) is not frozen


def branch_with(index: int, **optimizer: object) -> Any:
    """A branch with these keys of its optimizer, and `freeze_backbone_epochs` of its own."""
    config = tiny_config(optim__freeze_last_layer_epochs=0)
    branch = config.branches[index]
    keys = {"freeze_backbone_epochs": optimizer.pop("freeze_backbone_epochs", 0)}
    branch = branch.model_copy(update={**keys, "optimizer": branch.own_optimizer.model_copy(update=optimizer)})
    return single_branch(build_objective(config, torch.device("cpu")), config, branch, 4, STEPS)


def rates(branch: Any) -> dict[str, float]:
    """The learning rate of every parameter at step 3."""
    branch.optimizer.schedule(3)
    placed = {id(p): group["lr"] for group in branch.optimizer.torch.param_groups for p in group["params"]}
    return {name: placed[id(p)] for name, p in branch.student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("index", "layers"),
    [
        (0, {"conv1.0.weight": 5, "layer1.0.conv1.weight": 4, "layer4.0.conv1.weight": 1}),
        (1, {"cls_token": 3, "patch_embed.proj.weight": 3, "blocks.0.norm1.weight": 2, "blocks.1.norm1.bias": 1}),
    ],
)
def test_rates_decay_by_layer_below_the_heads(index: int, layers: dict[str, int]) -> None:
    branch = branch_with(index, layer_decay=0.5, backbone_lr_factor=0.1)
    plain, found = rates(branch_with(index)), rates(branch)
    for name, layer in layers.items():
        key = f"backbone.net.{name}"
        assert found[key] == pytest.approx(plain[key] * 0.1 * 0.5**layer), name
    for name in plain:
        if not name.startswith("backbone."):
            assert found[name] == plain[name], name
    if index == 1:  # the last normalisation goes with the last block
        assert found["backbone.net.norm.weight"] == found["backbone.net.blocks.1.norm1.bias"]
    # the rate that is logged is the branch's own
    assert branch.optimizer.schedule(3) == plain["mlp_head.mlp.0.weight"]


def test_a_network_whose_layers_timm_does_not_tell_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("timm.models.resnet.ResNet.group_matcher")
    with pytest.raises(UserError, match=r"branches\.resnet\.optimizer\.layer_decay: timm does not tell"):
        branch_with(0, layer_decay=0.5)


@pytest.mark.parametrize("index", [0, 1])
def test_a_frozen_backbone_stands_still_while_the_heads_learn(index: int) -> None:
    branch = branch_with(index, freeze_backbone_epochs=1)
    before = copy.deepcopy(branch.student.state_dict())
    for step in (STEPS - 2, STEPS - 1, STEPS):
        for p in branch.student.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        branch.optimizer.take_gradients(step)
        branch.optimizer.step(step)
        for name, p in branch.student.named_parameters():
            if p.requires_grad:
                stands = name.startswith("backbone.") and step < STEPS
                assert torch.equal(p, before[name]) is stands, (step, name)


def test_each_gradient_is_clipped_to_its_own_norm() -> None:
    gradients = [torch.full((4,), 5.0), torch.full((9,), 0.5), torch.tensor([30.0, 40.0])]
    expected = [g * min(1.0, 3.0 / (float(g.norm()) + 1e-6)) for g in gradients]
    clip_each(gradients, 3.0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_state_is_saved_by_name_and_restored(parts: tuple) -> None:
    config, branches = parts
    for branch in branches:
        generator = torch.Generator().manual_seed(1)
        for step in range(6, 9):
            for p in branch.student.parameters():
                p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            branch.optimizer.take_gradients(step)
            branch.optimizer.step(step)
        saved = {key: value.clone() for key, value in branch.optimizer.state_tensors().items()}
        other = BranchOptimizer(branch.student, branch.config, config.optim, config.lr_scale, STEPS)
        other.load_state_tensors(saved, lambda key, rows, saved=saved: saved[key])
        assert saved
        restored = other.state_tensors()
        assert restored.keys() == saved.keys()
        assert all(torch.equal(restored[key], saved[key]) for key in saved)


def test_scaling_in_few_launches_equals_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs do for clipping: large gradients by themselves, small ones together, each in its own memory order."""
    monkeypatch.setattr(optimizer_module, "_LARGE_ELEMENTS", 100)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (20, 10), (4, 3, 2, 2), (0, 5), (7, 2)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    factors = torch.rand(len(tensors), generator=generator)
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    optimizer_module.scale_each(tensors, factors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
