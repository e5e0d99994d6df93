"""Weights that begin, or cease, to count during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.checkpointing import state
from mokd.checkpointing.reading import Checkpoint
from mokd.config.ramps import RampConfig
from mokd.objectives.base import build_objective
from tests.support import CONTRASTIVE, RESNET, VIT, losses_of, single_branch, tiny_config

IMAGES = 4
LATE = {"start": 1.0, "length": 2.0}  # 0, 0, 1/2, 1, ... from epoch 0 on
EARLY = {**LATE, "first": 1.0, "last": 0.0}  # 1, 1, 1/2, 0, ...


@pytest.mark.parametrize(
    ("ramp", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"start": 2}, [0, 0, 1, 1]),
        (LATE, [0, 0, 0.5, 1]),
        ({"start": 0.25, "length": 0.5, "unit": "run"}, [0, 0, 0.5, 1]),
        ({"length": 4}, [0, 0.25, 0.5, 0.75]),
        (EARLY, [1, 1, 0.5, 0]),
        ({"start": 2, "first": 0.2, "last": 3}, [0.2, 0.2, 3, 3]),
    ],
)
def test_the_factor_by_epoch(ramp: dict[str, Any], factors: list[float]) -> None:
    config = RampConfig(**ramp)
    assert [config.factor(epoch, 4) for epoch in range(4)] == factors


def found(epoch: int, **changes: Any) -> list[tuple[dict[str, float], dict[str, float], list[torch.Tensor]]]:
    """Terms, weights and gradients of every branch in an epoch, from the same first weights."""
    config = tiny_config(**{"branches": [RESNET, VIT], "optim__epochs": 4, **changes})
    torch.manual_seed(5)
    objective = build_objective(config, torch.device("cpu"))
    branches = [single_branch(objective, config, branch, IMAGES) for branch in config.branches]
    views = [torch.randn(g.count, IMAGES, 3, g.size_px, g.size_px) for g in config.views.groups if g.count]
    results = []
    for branch, loss in zip(branches, losses_of(objective, branches, views, epoch), strict=True):
        loss.total.backward()
        gradients = [p.grad for p in branch.student.parameters() if p.grad is not None]
        torch.testing.assert_close(
            sum(w * loss.terms.get(t, 0.0) for t, w in loss.weights.items()), loss.total.detach()
        )
        results.append(({name: float(value) for name, value in loss.terms.items()}, loss.weights, gradients))
    return results


def assert_same(some: list[Any], others: list[Any]) -> None:
    for (terms, weights, gradients), (same_terms, same_weights, same_gradients) in zip(some, others, strict=True):
        assert (terms, weights) == (same_terms, same_weights)
        assert len(gradients) == len(same_gradients)
        assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


@pytest.mark.parametrize("term", ["cross_mlp", "cross_search"])
def test_a_cross_term_waits_as_if_it_were_off_and_then_is_the_methods(term: str) -> None:
    ramp = {f"objective__ramps__{term}": LATE}
    assert_same(found(1, **ramp), found(1, **{f"objective__terms__{term}": False}))
    assert_same(found(3, **ramp), found(3))


@pytest.mark.parametrize("term", ["cross_mlp", "cross_search"])
def test_a_cross_term_ends_as_if_it_were_off(term: str) -> None:
    ramp = {f"objective__ramps__{term}": EARLY}
    assert_same(found(1, **ramp), found(1))
    assert_same(found(3, **ramp), found(3, **{f"objective__terms__{term}": False}))


def test_one_branch_goes_on_learning_from_another_that_no_longer_does() -> None:
    ends = found(3, branches=[{**RESNET, "weight_ramp": EARLY}, VIT])
    never = found(3, branches=[{**RESNET, "weight": 0.0}, VIT])
    assert_same(ends, never)
    assert_same(ends[1:], found(3, branches=[RESNET, VIT])[1:])


def test_on_its_way_a_weight_is_a_part_of_itself() -> None:
    branches = [{**branch, "weight": 0.6} for branch in (RESNET, VIT)]
    ramps = found(2, branches=branches, **{f"objective__ramps__{term}": LATE for term in ("cross_mlp", "cross_search")})
    of_branches = found(2, branches=[{**branch, "weight_ramp": LATE} for branch in branches])
    halves = found(2, branches=[{**branch, "weight": 0.3} for branch in branches])
    assert_same(ramps, halves)
    assert_same(of_branches, halves)


def test_self_terms_wait_too() -> None:
    ((terms, weights, _), _) = found(2, objective__ramps__self_thead=LATE)
    assert weights == {"self_mlp": 1.0, "self_thead": 0.5, "cross_mlp": 1.0, "cross_search": 1.0}
    assert "self_thead" in terms


def test_the_contrastive_cross_term_waits() -> None:
    branches = [RESNET, VIT]
    late = [{**branch, "weight_ramp": LATE} for branch in branches]
    at = {epoch: found(epoch, **{**CONTRASTIVE, "branches": late}) for epoch in (0, 2, 3)}
    full = found(3, **{**CONTRASTIVE, "branches": branches})
    assert_same(at[3], full)
    for branch, (_, weights, _) in enumerate(full):
        for epoch, part in ((0, 0.0), (2, 0.5)):
            assert at[epoch][branch][1] == {"self": 1.0, "cross": part * weights["cross"]}


def test_recorded_steps_are_told_apart_by_what_weights_they_have() -> None:
    config = tiny_config(objective__ramps__cross_search=LATE, optim__epochs=6)
    objective = build_objective(config, torch.device("cpu"))
    branches = [single_branch(objective, config, branch, IMAGES) for branch in config.branches]
    constants = [objective.constants(branches, epoch) for epoch in range(31, 37)]  # past all warm-ups
    assert len(set(constants)) == 1
    early = {objective.constants(branches, epoch)[-1] for epoch in range(4)}
    assert len(early) == 3


def test_a_weight_that_never_counts_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective.ramps.cross_mlp: .* 3 epochs"):
        tiny_config(objective__ramps__cross_mlp={"start": 3.0})
    with pytest.raises(UserError, match=r"objective.ramps.cross_mlp: .* 3 epochs"):
        tiny_config(objective__ramps__cross_mlp={"last": 0.0})
    with pytest.raises(UserError, match=r"branches.vit.weight_ramp: .* 3 epochs"):
        tiny_config(branches=[RESNET, {**VIT, "weight_ramp": {"start": 1.0, "unit": "run"}}])


def test_a_run_from_before_goes_on_and_ramps_may_be_changed_on_the_way(tmp_path: Path) -> None:
    config = tiny_config()
    then = state.identity(config, {})
    assert "ramps" not in then["objective"]
    assert all("weight_ramp" not in branch for branch in then["branches"])
    old = Checkpoint(tmp_path, 1, {"identity": then, "changeable": {}})
    branches = [RESNET, {**VIT, "weight_ramp": {"start": 1.0}}]
    for other in (config, tiny_config(branches=branches, objective__ramps__cross_mlp={"length": 2.0})):
        state.check_identity(old, state.identity(other, {}))
    key = "objective.ramps.cross_mlp.length"
    assert state.changeable(tiny_config(objective__ramps__cross_mlp={"length": 2.0}))[key] == 2.0
