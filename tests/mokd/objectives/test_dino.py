"""The whole objective against the reference, in float64, for one, two and three branches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core.errors import UserError
from mokd.config import DinoConfig
from mokd.losses.prototypes import HeadOutput, Prototypes
from mokd.losses.reference import BranchLogits, four_terms, next_center
from mokd.objectives import dino
from mokd.objectives.branch import Branch
from mokd.objectives.dino import DinoObjective
from mokd.objectives.dino_network import NetworkOutput
from tests.support import RESNET, THIRD, VIT, losses_of, single_branch, tiny_config

B, GLOBALS, LOCALS = 3, 2, 3


def build(
    branches: Sequence[dict], epochs: int = 0, **changes: object
) -> tuple[DinoObjective, list[Branch], list[Tensor]]:
    config = tiny_config(branches=[{**b, "drop_path": 0.0} for b in branches], **changes)
    torch.manual_seed(5)
    objective = DinoObjective(config.objective, config, torch.device("cpu"))
    objective.frozen_epochs = 0
    built = [single_branch(objective, config, b, B) for b in config.branches]
    for branch in built:
        branch.student.double()
        branch.teacher.double()
        for p in branch.teacher.parameters():  # a teacher that differs from its student
            p.data.add_(0.05 * torch.randn_like(p))
    objective.centers = torch.randn_like(objective.centers.double())
    views = [torch.randn(GLOBALS, B, 3, 32, 32).double(), torch.randn(LOCALS, B, 3, 16, 16).double()]
    return objective, built, views


@pytest.mark.parametrize("gain", [None, 0.2])
def test_the_gain_of_the_t_heads_prototypes_starts_where_it_is_told(gain: float | None) -> None:
    _, branches, _ = build([RESNET, VIT], **({"objective__t_head__gain": gain} if gain else {}))
    for branch in branches:
        student = branch.student
        assert student.t_head.last_layer.gain.unique().tolist() == pytest.approx([gain or 1.0])
        assert student.mlp_head.last_layer.gain.unique().tolist() == [1.0]
        assert student.t_head.last_layer.gain.requires_grad


def temperature(epoch: int, warmup: int) -> float:
    return 0.07 if epoch >= warmup else 0.04 + 0.03 * epoch / (warmup - 1)


def literal_logits(output: HeadOutput, last_layer: Prototypes) -> Tensor:
    return F.linear(output.rows, F.normalize(last_layer.direction, dim=1) * last_layer.gain)


def reference_terms(
    objective: DinoObjective, branches: list[Branch], views: list[Tensor], epoch: int
) -> list[dict[str, Tensor]]:
    students = [b.student(views) for b in branches]
    with torch.no_grad():
        teachers = [b.teacher(views[:1]) for b in branches]
    said = [
        BranchLogits(
            literal_logits(student.mlp, branch.student.mlp_head.last_layer),
            literal_logits(student.t_head, branch.student.t_head.last_layer),
            literal_logits(teacher.mlp, branch.teacher.mlp_head.last_layer),
            literal_logits(teacher.t_head, branch.teacher.t_head.last_layer),
            *centers,
        )
        for branch, student, teacher, centers in zip(branches, students, teachers, objective.centers, strict=True)
    ]
    result = []
    for i, branch in enumerate(branches):
        others = [j for j in range(len(branches)) if j != i]
        terms = four_terms(
            said[i],
            [said[j] for j in others],
            [literal_search(branches[j], teachers[j], students[i].queries[GLOBALS:]) for j in others],
            own_temperature=temperature(epoch, branch.config.teacher_temp_warmup_epochs),
            cross_temperature=temperature(epoch, objective.config.cross_temp_warmup_epochs),
            center_search=objective.config.center_search,
        )
        result.append(terms)
    return result


@torch.no_grad()
def literal_search(other: Branch, teacher: NetworkOutput, queries: Tensor) -> Tensor:
    """Logits `[L, B, K]`: one query, one map, one row at a time."""
    head = other.teacher.t_head
    rows = [[head(teacher.tokens[b][None], query[None])[0] for b, query in enumerate(view)] for view in queries]
    return F.linear(
        torch.stack([torch.stack(view) for view in rows]), F.normalize(head.last_layer.direction) * head.last_layer.gain
    )


@pytest.mark.parametrize("branches", [[VIT], [RESNET, VIT], [RESNET, VIT, THIRD]], ids=["solo", "pair", "three"])
@pytest.mark.parametrize("center_search", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 40])
def test_every_term_equals_the_reference(branches: list[dict], epoch: int, center_search: bool) -> None:
    objective, built, views = build(branches, objective__center_search=center_search)
    expected = reference_terms(objective, built, views, epoch)
    losses = losses_of(objective, built, views, epoch)
    for branch, loss, terms in zip(built, losses, expected, strict=True):
        assert set(loss.terms) == set(terms)
        for name, value in terms.items():
            torch.testing.assert_close(loss.terms[name], value.detach(), rtol=1e-6, atol=0, msg=f"{branch.name}/{name}")
        total = terms["self_mlp"] + terms["self_thead"]
        if "cross_mlp" in terms:
            total = total + branch.config.weight * (terms["cross_mlp"] + terms["cross_search"])
        torch.testing.assert_close(loss.total, total, rtol=1e-6, atol=0)
        parameters = [p for p in branch.student.parameters() if p.requires_grad]
        # parts that a network does not use have no gradient in either
        options = {"allow_unused": True, "retain_graph": True}
        wanted = torch.autograd.grad(total, parameters, **options)
        found = torch.autograd.grad(loss.total, parameters, **options)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_gradients_reach_the_own_student_and_nothing_else() -> None:
    objective, built, views = build([RESNET, VIT])
    losses = losses_of(objective, built, views, 0)
    losses[0].total.backward()
    own = {name for name, p in built[0].student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    frozen = {"mlp_head.last_layer.gain"}  # not trained for this branch, by its configuration
    assert {name for name, _ in built[0].student.named_parameters()} - own == frozen
    for module in (built[0].teacher, built[1].student, built[1].teacher):
        assert all(p.grad is None for p in module.parameters())


def test_cross_terms_carry_no_gradient_into_the_other_branch() -> None:
    objective, built, views = build([RESNET, VIT], objective__terms={"self_mlp": False, "self_thead": False})
    losses = losses_of(objective, built, views, 0)
    torch.autograd.backward([loss.total for loss in losses[1:]])
    assert all(p.grad is None for p in built[0].student.parameters())
    assert any(p.grad is not None for p in built[1].student.parameters())


def test_while_frozen_prototypes_get_no_gradients_and_all_else_the_same() -> None:
    gradients = []
    for frozen_epochs in (0, 1):
        objective, built, views = build([RESNET, VIT])
        objective.frozen_epochs = frozen_epochs
        losses_of(objective, built, views, 0)[0].total.backward()
        gradients.append({name: p.grad for name, p in built[0].student.named_parameters()})
    for name, gradient in gradients[1].items():
        expected = None if ".last_layer." in name else gradients[0][name]
        assert (gradient is None and expected is None) or torch.equal(gradient, expected), name


def test_a_target_is_computed_once_for_self_and_cross_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = dino.teacher_probabilities
    monkeypatch.setattr(
        dino, "teacher_probabilities", lambda *given, **how: made.append(given[2]) or real(*given, **how)
    )
    objective, built, views = build([RESNET, VIT])
    losses_of(objective, built, views, 40)  # all temperatures are the same by then
    assert len(made) == 4  # two heads of two branches


def test_queries_are_detached_and_mean_what_the_method_says() -> None:
    _, (resnet, vit), views = build([RESNET, VIT])
    with torch.no_grad():
        features = resnet.student.backbone(views[1][0])
        projected = resnet.student.t_head.project(features.tokens)
        expected = projected.mean(dim=1)
    out = resnet.student([views[0], views[1][:1]])
    assert not out.queries.requires_grad
    # BatchNorm in training mode: the same batch gives the same statistics
    torch.testing.assert_close(out.queries[GLOBALS], expected)
    vit_out = vit.student(views)
    torch.testing.assert_close(vit_out.queries[0], vit.student.backbone(views[0].flatten(0, 1)).cls[:B].detach())


def test_centers_move_after_use_towards_the_global_mean() -> None:
    objective, built, views = build([RESNET, VIT])
    before = objective.centers.clone()
    losses_of(objective, built, views, 0)
    assert torch.equal(objective.centers, before)
    with torch.no_grad():
        said = [built[i].teacher(views[:1]).mlp.logits() for i in range(2)]
    objective.commit()
    for i in range(2):
        expected = next_center(before[i, 0], said[i], 0.9)
        torch.testing.assert_close(objective.centers[i, 0], expected, rtol=1e-6, atol=1e-9)


TERMS = ("self_mlp", "self_thead", "cross_mlp", "cross_search")


@pytest.mark.parametrize("branches", [[VIT], [RESNET, VIT]], ids=["solo", "pair"])
def test_every_combination_of_terms_trains_on_exactly_these(branches: list[dict]) -> None:
    """Loss and gradients of the branch that is in both, for all that can be switched on and off."""
    objective, built, views = build(branches)
    terms = reference_terms(objective, built, views, 0)[-1]
    parameters = [p for p in built[-1].student.parameters() if p.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    gradients = {name: torch.autograd.grad(value, parameters, **options) for name, value in terms.items()}
    weights = {name: built[-1].config.weight if name.startswith("cross") else 1.0 for name in terms}
    checked = 0
    for switches in itertools.product([True, False], repeat=len(TERMS)):
        on = dict(zip(TERMS, switches, strict=True))
        left = [name for name in terms if on[name]]
        if not left:
            continue
        objective.config = DinoConfig.model_validate({**objective.config.model_dump(), "terms": on})
        loss = losses_of(objective, built, views, 0)[-1]
        torch.testing.assert_close(loss.total, sum(weights[n] * terms[n] for n in left), rtol=1e-6, atol=0)
        found = torch.autograd.grad(loss.total, parameters, allow_unused=True, materialize_grads=True)
        for i, gradient in enumerate(found):
            expected = sum(weights[name] * gradients[name][i] for name in left)
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
        assert {name for name in loss.terms if name.startswith("cross")} == {n for n in left if n.startswith("cross")}
        checked += 1
    assert checked == (12 if len(branches) == 1 else 15)


@pytest.mark.parametrize(
    ("branches", "off", "says"),
    [
        ([VIT], ("self_mlp", "self_thead"), "a branch alone has the self terms only, and both are off"),
        ([RESNET, VIT], TERMS, "all four are off; nothing is left to learn from"),
    ],
)
def test_without_any_term_there_is_nothing_to_train(branches: list[dict], off: Sequence[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny_config(branches=branches, objective__terms=dict.fromkeys(off, False))


def test_without_search_no_local_views_are_needed() -> None:
    objective, built, views = build(
        [RESNET, VIT], objective__terms={"cross_search": False}, views__local_crops__count=0
    )
    losses = losses_of(objective, built, views[:1], 0)
    assert all(set(loss.terms) == {"self_mlp", "self_thead", "cross_mlp"} for loss in losses)


def test_teacher_follows_by_moving_average_and_keeps_its_own_statistics() -> None:
    _, (resnet, _), views = build([RESNET, VIT])
    before = {name: p.clone() for name, p in resnet.teacher.named_parameters()}
    statistics = {name: b.clone() for name, b in resnet.teacher.named_buffers()}
    resnet.update_teacher(0.9)
    student = dict(resnet.student.named_parameters())
    for name, p in resnet.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student[name])
    assert all(torch.equal(b, statistics[name]) for name, b in resnet.teacher.named_buffers())
    resnet.teacher(views[:1])
    assert not torch.equal(resnet.teacher.backbone.net.bn1.running_mean, statistics["backbone.net.bn1.running_mean"])


@pytest.mark.parametrize("branches", [[RESNET, VIT], [RESNET, VIT, THIRD]], ids=["pair", "three"])
@pytest.mark.parametrize("double", [True, False])
def test_cross_terms_between_the_same_view_are_the_mean_over_all_pairs(branches: list[dict], double: bool) -> None:
    objective, built, views = build(branches, objective__cross_same_view=True)
    epoch = 40
    losses = losses_of(objective, built, views, epoch)
    reference = []
    with torch.no_grad():
        teachers = [
            literal_logits(out.mlp, b.teacher.mlp_head.last_layer)
            for b, out in ((b, b.teacher(views[:1])) for b in built)
        ]
        for i, branch in enumerate(built):
            said = literal_logits(branch.student(views).mlp, branch.student.mlp_head.last_layer)
            log_p = torch.log_softmax(said / 0.1, dim=-1)
            others = [
                -(torch.softmax((teachers[j][q] - objective.centers[j, 0]) / 0.07, dim=-1) * log_p[v]).sum(-1).mean()
                for j in range(len(built))
                if j != i
                for q in range(GLOBALS)
                for v in range(GLOBALS + LOCALS)
            ]
            reference.append(torch.stack(others).mean())
    for loss, expected in zip(losses, reference, strict=True):
        torch.testing.assert_close(loss.terms["cross_mlp"], expected, rtol=1e-9, atol=0)
    if double:
        return
    # the compiled loss gives what torch's operations do
    single, _, _ = build(branches, objective__cross_same_view=True)
    single.centers = objective.centers.float()
    for branch in built:
        branch.student.float()
        branch.teacher.float()
    for ours, exact in zip(losses_of(single, built, [v.float() for v in views], epoch), losses, strict=True):
        torch.testing.assert_close(ours.terms["cross_mlp"].double(), exact.terms["cross_mlp"], rtol=1e-4, atol=0)
