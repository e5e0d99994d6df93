"""A cross target that all teachers make together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.comparison.solo import solo
from mokd.losses.reference import (
    ensemble_logits,
    gate,
    paired_cross_entropy,
    teacher_targets,
    view_agreement,
)
from tests.mokd.objectives.test_dino import build, literal_logits, reference_terms
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, frozen, losses_of, tiny_config

EPOCH, K = 40, 40
TOGETHER = {**VIT, "cross_target": "ensemble"}
MATCHED = {"objective__match_prototypes": 24, "objective__ramps__cross_mlp": {"start": 1.0}}
CASES: dict[str, dict[str, Any]] = {
    "method": {},
    "matched": MATCHED,
    "gated": {"objective__cross_gate": {"agreement": True}},
    "same-view": {"objective__cross_same_view": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("branches", [[RESNET, TOGETHER], [RESNET, TOGETHER, THIRD]], ids=["pair", "three"])
def test_the_term_equals_the_reference_and_all_else_is_the_methods(branches: list[dict], case: str) -> None:
    objective, built, views = build(branches, **CASES[case])
    objective.centers *= 0.1
    orders = torch.arange(K).expand(len(built), K).clone()
    if case == "matched":
        for n in range(1, len(built)):
            orders[n] = torch.randperm(K)
        assert objective._matching is not None
        objective._matching.orders[:, 0] = orders
        objective._matching.done = [True, True]

    with torch.no_grad():
        teachers = [b.teacher(views[:1]) for b in built]
        logits = [literal_logits(t.mlp, b.teacher.mlp_head.last_layer) for t, b in zip(teachers, built, strict=True)]
    # in the numbering of branch 1: its prototype orders[1][k] is the others' orders[n][k]
    here = [orders[n][orders[1].argsort()] for n in range(len(built))]
    centers = [objective.centers[n, 0][order] for n, order in enumerate(here)]
    together = ensemble_logits([t[..., order] for t, order in zip(logits, here, strict=True)], centers)
    targets = teacher_targets(together, None, 0.07)
    said = literal_logits(built[1].student(views).mlp, built[1].student.mlp_head.last_layer)
    weights = None
    if case == "gated":
        others = [n for n in range(len(built)) if n != 1]
        agreement = [view_agreement(teacher_targets(logits[n], objective.centers[n, 0], 0.07)) for n in others]
        weights = torch.stack([gate(a, 0.0, 0.0, None) for a in agreement]).mean(dim=0)
    expected = paired_cross_entropy(said, targets, 0.1, weights)
    if case == "same-view":
        log_p = torch.log_softmax(said / 0.1, dim=-1)
        expected = -(targets.mean(dim=0) * log_p).sum(dim=-1).mean()

    losses = losses_of(objective, built, views, EPOCH)
    torch.testing.assert_close(losses[1].terms["cross_mlp"], expected.detach(), rtol=1e-6, atol=0)
    if case == "method":
        for loss, terms in zip(losses, reference_terms(objective, built, views, EPOCH), strict=True):
            for name in ("self_mlp", "self_thead", "cross_search", *(["cross_mlp"] if loss is not losses[1] else [])):
                torch.testing.assert_close(loss.terms[name], terms[name].detach(), rtol=1e-6, atol=0)
            if loss is losses[1]:
                terms["cross_mlp"] = expected
                parameters = [p for p in built[1].student.parameters() if p.requires_grad]
                total = sum(loss.weights[name] * value for name, value in terms.items())
                wanted = torch.autograd.grad(total, parameters)
                for ours, theirs in zip(torch.autograd.grad(loss.total, parameters), wanted, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_teachers_that_are_equal_make_their_own_target() -> None:
    """In fp32, by the compiled loss where it is built."""
    objective, built, views = build([VIT, {**TOGETHER, "name": "twin"}])
    built[1].student.load_state_dict(built[0].student.state_dict())
    built[1].teacher.load_state_dict(built[0].teacher.state_dict())
    objective.centers[1] = objective.centers[0] = 0.1 * objective.centers[0]
    objective.centers = objective.centers.float()
    for branch in built:
        branch.student.float()
        branch.teacher.float()
    single = [view.float() for view in views]
    first, twin = losses_of(objective, built, single, EPOCH)
    torch.testing.assert_close(twin.terms["cross_mlp"], first.terms["cross_mlp"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"branches": [TOGETHER]}, "branches.vit.cross_target: means nothing to a branch alone"),
        ({"branches": [RESNET, frozen(TOGETHER)]}, "branches.vit.cross_target: a frozen branch learns nothing"),
        ({"objective__terms": {"cross_mlp": False}}, "branches.vit.cross_target: objective.terms.cross_mlp is off"),
        (CONTRASTIVE, "branches.vit.cross_target: objective contrastive has no such part"),
    ],
)
def test_where_there_is_no_such_term_it_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny_config(**{"branches": [RESNET, TOGETHER], **changes})


def test_a_baseline_has_nothing_of_it() -> None:
    assert solo(tiny_config(branches=[RESNET, TOGETHER]), "vit").branches == solo(tiny_config(), "vit").branches
