"""What a target from another branch weighs: by the agreement of its views, and by the gap between branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from mokd.comparison.solo import solo
from mokd.losses import reference
from mokd.objectives.branch import Branch
from mokd.objectives.cross_gate import MOMENTUM, CrossGate, view_agreement
from mokd.objectives.dino import DinoObjective
from tests.mokd.objectives.test_dino import GLOBALS, build, literal_logits, literal_search, reference_terms
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, losses_of, tiny_config

EPOCH = 40
AGREEMENT = {"objective__cross_gate": {"agreement": True}}
GAP = {"objective__cross_gate": {"agreement": True, "gap": 0.1}}


def gate_of(objective: DinoObjective) -> CrossGate:
    assert objective._gate is not None
    return objective._gate


def test_agreement_is_1_for_equal_views_and_0_for_views_apart() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [1.0, 0, 0, 0]], [[0.5, 0.5, 0.0, 0.0], [0, 0, 0.3, 0.7]]])
    assert view_agreement(p).tolist() == pytest.approx([1.0, 0.0])
    p = torch.softmax(torch.randn(3, 5, 7, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(view_agreement(p), reference.view_agreement(p), rtol=1e-12, atol=0)


def expected_terms(
    objective: DinoObjective, branches: list[Branch], views: list[Tensor], i: int
) -> tuple[Tensor, Tensor]:
    """Both cross terms of a branch, from the reference's parts."""
    student = branches[i].student(views)
    said = literal_logits(student.mlp, branches[i].student.mlp_head.last_layer)
    local = literal_logits(student.t_head, branches[i].student.t_head.last_layer)[GLOBALS:]
    learned, searched = [], []
    gate = gate_of(objective)
    for j, other in enumerate(branches):
        if j == i:
            continue
        with torch.no_grad():
            teacher = other.teacher(views[:1])
        logits = literal_logits(teacher.mlp, other.teacher.mlp_head.last_layer)
        targets = reference.teacher_targets(logits, objective.centers[j, 0], 0.07)
        agreement = reference.view_agreement(targets)
        if not gate.config.agreement:
            agreement = torch.ones_like(agreement)
        taker, giver = float(gate.reliability[i]), float(gate.reliability[j])
        weights = reference.gate(agreement, taker, giver, gate.config.gap)
        learned.append(reference.paired_cross_entropy(said, targets, 0.1, weights))
        found = reference.teacher_targets(literal_search(other, teacher, student.queries[GLOBALS:]), None, 0.07)
        searched.append(reference.row_cross_entropy(local, found, 0.1, weights))
    return torch.stack(learned).mean(), torch.stack(searched).mean()


@pytest.mark.parametrize("branches", [[RESNET, VIT], [RESNET, VIT, THIRD]], ids=["pair", "three"])
@pytest.mark.parametrize("gate", [AGREEMENT, GAP, {"objective__cross_gate": {"gap": 0.1}}])
def test_every_term_equals_the_reference(branches: list[dict], gate: dict[str, Any]) -> None:
    objective, built, views = build(branches, **gate)
    objective.centers *= 0.1
    gate_of(objective).reliability = torch.tensor([0.2, 0.5, 0.55][: len(built)]).double()
    self_terms = reference_terms(objective, built, views, EPOCH)
    for i, loss in enumerate(losses_of(objective, built, views, EPOCH)):
        cross = expected_terms(objective, built, views, i)
        terms = {**self_terms[i], "cross_mlp": cross[0], "cross_search": cross[1]}
        total = sum(loss.weights[name] * value for name, value in terms.items())
        for name, value in terms.items():
            torch.testing.assert_close(loss.terms[name], value.detach(), rtol=1e-6, atol=1e-12)
        parameters = [p for p in built[i].student.parameters() if p.requires_grad]
        options = {"allow_unused": True, "materialize_grads": True}
        wanted = torch.autograd.grad(total, parameters, **options)
        for ours, theirs in zip(torch.autograd.grad(loss.total, parameters, **options), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)
        assert 0.0 <= float(loss.observe().scalars["cross_gate"]) <= 1.0


def test_a_branch_far_ahead_is_paused_and_the_other_is_not() -> None:
    objective, built, views = build([RESNET, VIT], objective__cross_gate={"gap": 0.1})
    gate_of(objective).reliability = torch.tensor([0.2, 0.5]).double()
    resnet, vit = losses_of(objective, built, views, EPOCH)
    plain, _, _ = build([RESNET, VIT])
    plain.centers = objective.centers
    same, _ = losses_of(plain, built, views, EPOCH)
    assert vit.terms["cross_mlp"] == vit.terms["cross_search"] == 0.0
    for name, value in same.terms.items():
        torch.testing.assert_close(resnet.terms[name], value, rtol=1e-12, atol=0)
    vit_alone = torch.autograd.grad(vit.total, list(built[1].student.parameters()), retain_graph=True)
    objective.config = objective.config.model_copy(
        update={"terms": objective.config.terms.model_copy(update={"cross_mlp": False, "cross_search": False})}
    )
    (_, alone) = losses_of(objective, built, views, EPOCH)
    for ours, theirs in zip(
        vit_alone, torch.autograd.grad(alone.total, list(built[1].student.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_reliability_is_a_running_mean_over_micro_batches_and_is_saved() -> None:
    objective, built, views = build([RESNET, VIT], **GAP)
    objective.centers *= 0.1
    gate_of(objective).reliability = torch.tensor([0.3, 0.4]).double()
    seen = []
    for part in (views, [view + 0.5 for view in views]):
        taught = objective.teach(built, part, EPOCH)
        objective.remember(taught)
        seen.append(taught.agreement.mean(dim=1))
    before = gate_of(objective).reliability.clone()
    objective.commit()
    expected = MOMENTUM * before + (1 - MOMENTUM) * (seen[0] + seen[1]) / 2
    torch.testing.assert_close(gate_of(objective).reliability, expected)
    other, _, _ = build([RESNET, VIT], **GAP)
    other.load_state_tensors(objective.state_tensors())
    torch.testing.assert_close(gate_of(other).reliability, expected.float())


def test_the_search_is_weighed_alike_without_the_other_term() -> None:
    objective, built, views = build([RESNET, VIT], **AGREEMENT, objective__terms={"cross_mlp": False})
    full, _, _ = build([RESNET, VIT], **AGREEMENT)
    full.centers = objective.centers = 0.1 * objective.centers
    for ours, theirs in zip(*(losses_of(o, built, views, EPOCH) for o in (objective, full)), strict=True):
        assert "cross_mlp" not in ours.terms
        assert torch.equal(ours.terms["cross_search"], theirs.terms["cross_search"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"branches": [VIT]}, "objective.cross_gate: means nothing to a branch alone"),
        ({"objective__terms": {"cross_mlp": False, "cross_search": False}}, "both cross terms are off"),
        ({"objective__cross_gate": {"gap": 1.5}}, "gap"),
        ({**CONTRASTIVE, "objective": {**CONTRASTIVE["objective"], "cross_gate": {"gap": 0.1}}}, "cross_gate"),
    ],
)
def test_where_there_is_nothing_to_weigh_it_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny_config(**{**GAP, **changes})


def test_a_baseline_has_nothing_of_it() -> None:
    assert solo(tiny_config(**GAP), "vit").objective == solo(tiny_config(), "vit").objective
