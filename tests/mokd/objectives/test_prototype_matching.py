"""Prototypes of two branches that stand for the same images, matched when a cross term begins to count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from mokd.comparison.solo import solo
from mokd.losses.kernels import cpu
from mokd.losses.reference import matched_order
from mokd.objectives import prototype_matching
from mokd.objectives.branch import Branch
from mokd.objectives.dino import HEADS, DinoObjective
from mokd.objectives.prototype_matching import PrototypeMatching, best_order, co_assignment
from tests.mokd.objectives.test_dino import build
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, losses_of, tiny_config

K = 40
WAITING = {f"objective__ramps__{term}": {"start": 1.0} for term in ("cross_mlp", "cross_search")}
MATCHED: dict[str, Any] = {"objective__match_prototypes": 24, **WAITING}
TWIN = {**VIT, "name": "twin"}


def matching(objective: DinoObjective) -> PrototypeMatching:
    assert objective._matching is not None
    return objective._matching


@torch.no_grad()
def permute(branch: Branch, centers: Tensor, orders: Tensor) -> None:
    """Moves the prototypes of both heads: the one that was at `orders[h, k]` lies at k afterwards."""
    for network in (branch.student, branch.teacher):
        for head, order in zip((network.mlp_head, network.t_head), orders, strict=True):
            for p in (head.last_layer.direction, head.last_layer.gain):
                p.copy_(p[order])
    for center, order in zip(centers, orders, strict=True):
        center.copy_(center[order])


def see(objective: DinoObjective, branches: list[Branch], views: list[Tensor], steps: int = 3) -> None:
    for _ in range(steps):
        objective.remember(objective.teach(branches, views, 0))
        before = objective.centers.clone()
        objective.commit()
        objective.centers.copy_(before)


def test_the_best_order_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (3, 8, 40):
        first, second = (torch.randint(5, (rows,), generator=generator) for _ in range(2))
        counts = co_assignment(*(x.numpy().astype(np.int32) for x in (first, second)), 5)
        assert counts.sum() == rows
        orders = np.array([matched_order(first, second, 5), best_order(counts)])
        agreement = counts[np.arange(5), orders].sum(axis=1)
        in_place = (orders == np.arange(5)).sum(axis=1)
        assert agreement[0] == agreement[1]
        assert in_place[0] == in_place[1]


def test_a_branch_with_its_prototypes_elsewhere_is_recognised() -> None:
    objective, branches, views = build([VIT, TWIN], **MATCHED)
    first, twin = branches
    twin.student.load_state_dict(first.student.state_dict())
    twin.teacher.load_state_dict(first.teacher.state_dict())
    # so that images differ in what is left
    objective.centers[:] = objective.teach(branches, views, 0).means[:1]
    moved = torch.stack([torch.randperm(K) for _ in HEADS])
    permute(twin, objective.centers[1], moved)
    see(objective, branches, views)
    used = objective.teach(branches, views, 0).assigned[0].flatten(1)  # [H, Q * B]
    teachers = objective.teach(branches, views, 1)
    assert matching(objective).done == [True, True]
    for head, order in enumerate(matching(objective).orders[1]):
        assert len(used[head].unique()) > 1
        # the twin's prototype that was at k before
        expected = moved[head].argsort()
        assert torch.equal(order[used[head]].long(), expected[used[head]])
        assert torch.equal(order.sort().values.long(), torch.arange(K))
    targets = teachers.probabilities(1, 0, 0.07)  # the temperature does not change which is largest
    assert torch.equal(matching(objective).translate(targets, 1, 0, 0).argmax(-1), used[0].view(targets.shape[:2]))


@pytest.mark.parametrize("branches", [[RESNET, VIT], [RESNET, VIT, THIRD]], ids=["pair", "three"])
def test_it_is_what_moving_all_prototypes_would_be(branches: list[dict]) -> None:
    """Terms and gradients of every branch against those where prototypes and centres are moved to their orders."""
    epoch = 40
    objective, built, views = build(branches, **MATCHED)
    orders = matching(objective).orders
    for n in range(1, len(built)):
        orders[n] = torch.stack([torch.randperm(K) for _ in HEADS])
    matching(objective).done = [True, True]
    found = losses_of(objective, built, views, epoch)
    gradients = [dict(zip(names(b), torch.autograd.grad(x.total, learning(b)), strict=True))
                 for b, x in zip(built, found, strict=True)]  # fmt: skip

    plain, _, _ = build(branches)
    plain.centers = objective.centers.clone()
    for n, branch in enumerate(built):
        permute(branch, plain.centers[n], orders[n].long())
    for n, (branch, ours, theirs) in enumerate(zip(built, found, losses_of(plain, built, views, epoch), strict=True)):
        for term, value in theirs.terms.items():
            torch.testing.assert_close(ours.terms[term], value, rtol=1e-9, atol=0)
        for name, gradient in zip(names(branch), torch.autograd.grad(theirs.total, learning(branch)), strict=True):
            expected = gradients[n][name]
            if ".last_layer." in name:
                expected = expected[orders[n, int(name.startswith("t_head"))].long()]
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-11)


def learning(branch: Branch) -> list[Tensor]:
    return [dict(branch.student.named_parameters())[name] for name in names(branch)]


def names(branch: Branch) -> list[str]:
    return [name for name, p in branch.student.named_parameters() if p.requires_grad]


def test_own_terms_stay_the_same_bits_and_so_does_everything_while_terms_wait() -> None:
    objective, built, views = build([RESNET, VIT], **MATCHED)
    plain, _, _ = build([RESNET, VIT], **WAITING)
    plain.centers = objective.centers.clone()
    see(objective, built, views)
    for epoch in (0, 1):
        changed = False
        ours, theirs = (losses_of(o, built, views, epoch) for o in (objective, plain))
        for a, b in zip(ours, theirs, strict=True):
            assert a.terms.keys() == b.terms.keys()
            assert all(torch.equal(a.terms[t], b.terms[t]) for t in ("self_mlp", "self_thead"))
            changed |= any(not torch.equal(a.terms[t], b.terms[t]) for t in a.terms)
            assert torch.equal(a.total, b.total) == (epoch == 0)
        assert changed == (epoch == 1)
        objective.commit()
        objective.centers = plain.centers.clone()


def test_a_term_that_waits_longer_is_matched_later_and_each_once() -> None:
    late = {**MATCHED, "objective__ramps__cross_search": {"start": 2.0}}
    objective, built, views = build([RESNET, VIT], **late)
    see(objective, built, views)
    objective.teach(built, views, 1)
    assert matching(objective).done == [True, False]
    first = matching(objective).orders.clone()
    assert not torch.equal(first[1, 0], first[0, 0])
    assert torch.equal(first[1, 1], first[0, 1])
    views = [view.flip(1) + 1.0 for view in views]
    see(objective, built, views)
    objective.teach(built, views, 2)
    objective.teach(built, views, 3)
    assert matching(objective).done == [True, True]
    assert torch.equal(matching(objective).orders[:, 0], first[:, 0])
    assert not matching(objective).collects
    assert matching(objective)._recent.numel() == 0


def test_only_recent_images_count() -> None:
    seen = PrototypeMatching(["a", "b"], HEADS, 3, steps=2, device=torch.device("cpu"))
    for a, b in (([0, 1], [0, 1]), ([0, 1], [1, 0]), ([0, 2], [1, 2])):
        seen.remember(torch.tensor([a, b]).view(2, 1, 1, 2).expand(2, 2, 1, 2))
        seen.commit()
    seen.match(0)
    assert seen.orders[:, 0].tolist() == [[0, 1, 2], [1, 0, 2]]


def test_the_state_goes_on_where_it_was() -> None:
    objective, built, views = build([RESNET, VIT], **MATCHED)
    see(objective, built, views)
    other, _, _ = build([RESNET, VIT], **MATCHED)
    other.load_state_tensors({k: t.clone() for k, t in objective.state_tensors().items()})
    for one in (objective, other):
        losses_of(one, built, views, 1)
    assert torch.equal(matching(objective).orders, matching(other).orders)
    assert matching(other).done == [True, True]
    after, _, _ = build([RESNET, VIT], **MATCHED)
    after.load_state_tensors({k: t.clone() for k, t in objective.state_tensors().items()})
    ours, theirs = (losses_of(o, built, views, 1) for o in (after, objective))
    assert all(torch.equal(a.total, b.total) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif(not cpu.available(), reason="the compiled loss was not built")
def test_translated_targets_lie_as_the_compiled_loss_wants_them() -> None:
    seen = PrototypeMatching(["a", "b"], HEADS, K, steps=1, device=torch.device("cpu"))
    seen.orders[1, 0] = torch.randperm(K)
    seen.done = [True, True]
    p = torch.rand(K, 2, 3).permute(1, 2, 0)
    moved = seen.translate(p, 1, 0, 0)
    assert cpu.by_prototype(moved)
    assert torch.equal(moved, p[..., seen.orders[1, 0].long()])
    assert torch.equal(seen.translate(moved, 0, 1, 0), p)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"branches": [VIT]}, "means nothing to a branch alone"),
        ({"objective__terms": {"cross_mlp": False, "cross_search": False}}, "both cross terms are off"),
        ({"objective__prototypes": 8193}, "at most 8192 prototypes"),
        ({"objective__ramps": {}}, "count from the first step.*objective.ramps.cross_mlp"),
    ],
)
def test_where_there_is_nothing_to_match_it_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"objective.match_prototypes: .*{says}"):
        tiny_config(**{**MATCHED, **changes})


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototype_matching, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"objective.match_prototypes: needs SciPy: pip install 'mokd\[matching\]'"):
        build([RESNET, VIT], **MATCHED)


def test_other_objectives_have_no_such_key() -> None:
    objective = {**CONTRASTIVE["objective"], "match_prototypes": 24}
    with pytest.raises(UserError, match="match_prototypes"):
        tiny_config(**{**CONTRASTIVE, "objective": objective})


def test_a_baseline_has_nothing_of_it() -> None:
    pair = tiny_config(**MATCHED)
    assert solo(pair, "vit").objective == solo(tiny_config(**WAITING), "vit").objective
