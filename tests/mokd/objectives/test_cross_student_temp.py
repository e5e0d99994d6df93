"""A student's own temperature in its cross terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.comparison.solo import solo
from tests.mokd.objectives.test_dino import build, reference_terms
from tests.support import CONTRASTIVE, RESNET, VIT, frozen, losses_of, tiny_config

EPOCH = 40
SOFTER = {**VIT, "cross_student_temp": 0.25}


def test_the_cross_terms_have_it_and_the_own_terms_do_not() -> None:
    objective, built, views = build([RESNET, SOFTER])
    expected = reference_terms(objective, built, views, EPOCH)
    plain, method, _ = build([RESNET, VIT])
    plain.centers = objective.centers
    for branch, same in zip(built, method, strict=True):
        same.student.load_state_dict(branch.student.state_dict())
        same.teacher.load_state_dict(branch.teacher.state_dict())
    losses, others = losses_of(objective, built, views, EPOCH), losses_of(plain, method, views, EPOCH)
    assert torch.equal(losses[0].total, others[0].total)
    for loss, other, branch, terms in zip(losses, others, built, expected, strict=True):
        total = sum(loss.weights[name] * value for name, value in terms.items())
        assert set(loss.terms) == set(terms)
        for name, value in terms.items():
            torch.testing.assert_close(loss.terms[name], value.detach(), rtol=1e-6, atol=0)
            differs = name.startswith("cross") and branch is built[1]
            assert (loss.terms[name] != other.terms[name]) == differs
        parameters = [p for p in branch.student.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(total, parameters)
        for ours, theirs in zip(torch.autograd.grad(loss.total, parameters), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_that_of_the_own_terms_changes_no_bit() -> None:
    objective, built, views = build([RESNET, VIT])
    same, others, _ = build([RESNET, {**VIT, "cross_student_temp": objective.config.student_temp}])
    same.centers = objective.centers
    for branch, other in zip(built, others, strict=True):
        other.student.load_state_dict(branch.student.state_dict())
        other.teacher.load_state_dict(branch.teacher.state_dict())
    for ours, theirs in zip(losses_of(objective, built, views, 0), losses_of(same, others, views, 0), strict=True):
        assert torch.equal(ours.total, theirs.total)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"branches": [SOFTER]}, "branches.vit.cross_student_temp: means nothing to a branch alone"),
        ({"branches": [RESNET, frozen(SOFTER)]}, "branches.vit.cross_student_temp: a frozen branch learns nothing"),
        ({"objective__terms": {"cross_mlp": False, "cross_search": False}}, "both cross terms are off"),
        (CONTRASTIVE, "branches.vit.cross_student_temp: objective contrastive has no such part"),
    ],
)
def test_where_there_are_no_cross_terms_it_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny_config(**{"branches": [RESNET, SOFTER], **changes})


def test_a_baseline_has_nothing_of_it() -> None:
    assert solo(tiny_config(branches=[RESNET, SOFTER]), "vit").branches == solo(tiny_config(), "vit").branches
