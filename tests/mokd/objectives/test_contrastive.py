"""The contrastive objective against the reference, in float64, for one, two and three branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.distributed.local_ranks import train_locally
from mokd.losses import info_nce as module
from mokd.losses import reference
from mokd.losses.info_nce import info_nce
from mokd.objectives.base import build_objective
from mokd.objectives.branch import Branch, BranchLoss
from mokd.objectives.contrastive import ContrastiveObjective
from mokd.objectives.contrastive_network import ContrastiveNetwork, Seen
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from mokd.training.feasibility import check
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, losses_of, single_branch, tiny_config

B, PX, K = 3, 64, 40  # 64 px: the ResNet has a map of 2 x 2, the ViT one of 8 x 8
KEYS = 2 * B


def build(branches: Sequence[dict[str, Any]], **changes: Any) -> tuple[ContrastiveObjective, list[Branch], Tensor]:
    config = tiny_config(
        branches=[{**b, "drop_path": 0.0} for b in branches],
        **CONTRASTIVE,
        views__global_crops__size_px=PX,
        optim__global_batch=4,
        **changes,
    )
    torch.manual_seed(5)
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, ContrastiveObjective)
    built = [single_branch(objective, config, b, B) for b in config.branches]
    for branch in built:
        branch.student.double()
        branch.teacher.double()
        for p in branch.teacher.parameters():  # a teacher that differs from its student
            p.data.add_(0.05 * torch.randn_like(p))
    for bank in objective.banks.values():
        bank.keys = nn.functional.normalize(torch.randn(K, 16).double(), dim=1)
    return objective, built, images(0)


def images(step: int) -> Tensor:
    return torch.randn(2, B, 3, PX, PX, generator=torch.Generator().manual_seed(step)).double()


def step(objective: ContrastiveObjective, branches: list[Branch], crops: Tensor) -> list[BranchLoss]:
    losses = losses_of(objective, branches, [crops], 0)
    objective.commit()
    return losses


def project(network: ContrastiveNetwork, features: Tensor) -> Tensor:
    first, _, last = network.projection
    return nn.functional.normalize(last(nn.functional.gelu(first(features))), dim=-1)


def reference_terms(objective: ContrastiveObjective, branches: list[Branch], crops: Tensor) -> list[dict[str, Tensor]]:
    """Every term of every branch, with its graph; a query meets keys and maps of the other view, one view at a time."""
    banks, by_view = [objective.banks[branch.name].keys for branch in branches], crops.shape[:2]
    with torch.no_grad():
        features = [branch.teacher.backbone(crops.flatten(0, 1)) for branch in branches]
        keys = [project(b.teacher, f.pooled).unflatten(0, by_view) for b, f in zip(branches, features, strict=True)]
        maps = [project(b.teacher, f.tokens).unflatten(0, by_view) for b, f in zip(branches, features, strict=True)]
    result = []
    for i, branch in enumerate(branches):
        pooled = branch.student.backbone(crops.flatten(0, 1)).pooled.unflatten(0, by_view)
        own, cross = [], []
        for view in (0, 1):
            queries = project(branch.student, pooled[view])
            own.append(reference.info_nce(queries, keys[i][1 - view], banks[i], 0.07))
            for j in [j for j in range(len(branches)) if j != i]:
                layers = branch.student.matching
                extracted = reference.extraction(maps[j][1 - view], layers.extraction.weight)
                weights = reference.matching(queries, extracted)
                aligned = reference.alignment(weights, extracted, keys[j][1 - view], layers.alignment.weight)
                cross.append(reference.info_nce(queries, aligned, banks[j], 0.07))
        terms = {"self": torch.cat(own).mean()}
        if cross:
            terms["cross"] = torch.cat(cross).mean()
        result.append(terms)
    return result


@pytest.mark.parametrize("branches", [[VIT], [RESNET, VIT], [RESNET, VIT, THIRD]], ids=["solo", "pair", "three"])
def test_every_term_and_gradient_equals_the_reference(branches: list[dict[str, Any]]) -> None:
    objective, built, crops = build(branches)
    expected = reference_terms(objective, built, crops)
    losses = losses_of(objective, built, [crops], 0)
    for branch, loss, terms in zip(built, losses, expected, strict=True):
        assert set(loss.terms) == set(terms) == ({"self"} if len(branches) == 1 else {"self", "cross"})
        for name, value in terms.items():
            torch.testing.assert_close(loss.terms[name], value.detach(), rtol=1e-9, atol=0, msg=f"{branch.name}/{name}")
        total = terms["self"]
        if "cross" in terms:
            total = total + 0.01 * branch.config.weight * terms["cross"]
        torch.testing.assert_close(loss.total, total, rtol=1e-9, atol=0)
        parameters = list(branch.student.parameters())
        ours = torch.autograd.grad(loss.total, parameters)
        for gradient, wanted in zip(ours, torch.autograd.grad(total, parameters), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-10)


def test_a_step_trains_its_own_student_with_extraction_and_alignment_and_nothing_else() -> None:
    objective, (resnet, vit), crops = build([RESNET, VIT])
    before = {name: bank.keys.clone() for name, bank in objective.banks.items()}
    losses = losses_of(objective, [resnet, vit], [crops], 0)
    losses[0].total.backward()
    still = {name for name, p in resnet.student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still == set()
    assert {"matching.extraction.weight", "matching.alignment.weight"} <= dict(resnet.student.named_parameters()).keys()
    for network in (resnet.teacher, vit.student, vit.teacher):
        assert all(p.grad is None for p in network.parameters())
    for name, bank in objective.banks.items():
        assert not bank.keys.requires_grad
        assert torch.equal(bank.keys, before[name]), "keys enter after use"


def test_only_the_cross_term_moves_extraction_and_alignment() -> None:
    objective, built, crops = build([RESNET, VIT])
    matching = built[0].student.matching
    small = torch.autograd.grad(losses_of(objective, built, [crops], 0)[0].total, matching.parameters())
    objective.config = objective.config.model_copy(update={"cross_weight": 0.03})
    large = torch.autograd.grad(losses_of(objective, built, [crops], 0)[0].total, matching.parameters())
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(b, 3 * a, rtol=1e-9, atol=0)


def test_without_cross_terms_each_branch_is_trained_as_if_alone() -> None:
    objective, built, crops = build([RESNET, VIT], objective__cross_weight=0.0)
    assert all(branch.student.matching is None for branch in built)
    alone, (vit,), _ = build([VIT])
    for network, other in ((vit.student, built[1].student), (vit.teacher, built[1].teacher)):
        network.load_state_dict(other.state_dict())
    alone.banks["vit"].keys = objective.banks["vit"].keys
    assert torch.equal(losses_of(objective, built, [crops], 0)[1].total, losses_of(alone, [vit], [crops], 0)[0].total)


def test_positives_are_never_among_the_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, built, _ = build([RESNET, VIT])
    met = []

    def watched(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        met.append((positives.detach().clone(), negatives.clone()))
        return info_nce(queries, positives, negatives, temperature)

    monkeypatch.setattr("mokd.objectives.contrastive.info_nce", watched)
    for n in range(9):  # the bank goes round once
        step(objective, built, images(n))
    assert len(met) == 9 * 4
    for positives, negatives in met:
        assert not (positives.unsqueeze(1) == negatives).all(dim=-1).any()
    # the keys of the step before are there: it is the order of use and update that keeps this step's out
    for before, now in zip(met[:-4:4], met[4::4], strict=True):
        assert (before[0].unsqueeze(1) == now[1]).all(dim=-1).any(dim=1).all()


def test_the_bank_takes_the_teachers_keys_by_view_then_image() -> None:
    objective, built, _ = build([RESNET, VIT])
    expected = {name: bank.keys.clone() for name, bank in objective.banks.items()}
    place = 0
    for n in range(8):  # 48 keys in 40 places
        with torch.no_grad():
            keys = {b.name: b.teacher(images(n)).projected for b in built}
        step(objective, built, images(n))
        for view in (0, 1):
            for b in range(B):
                for name in keys:
                    expected[name][place % K] = keys[name][view, b]
                place += 1
    for name, bank in objective.banks.items():
        torch.testing.assert_close(bank.keys, expected[name], rtol=1e-9, atol=1e-12)
        assert bank.written == place


def test_keys_come_from_the_teacher_in_training_mode() -> None:
    objective, (resnet,), crops = build([RESNET])
    losses_of(objective, [resnet], [crops], 0)
    assert len(objective._keys) == 1
    with torch.no_grad():
        keys = resnet.teacher(crops).projected
        assert resnet.teacher.training
        torch.testing.assert_close(objective._keys[0][0], keys)
        evaluated = resnet.teacher.eval()(crops).projected
    assert (evaluated - keys).abs().max() > 1e-3, "running statistics would have given other keys"


def test_the_first_step_meets_random_keys_and_monitors_follow_the_bank() -> None:
    config = tiny_config(branches=[RESNET, VIT], optim__global_batch=4, **CONTRASTIVE)
    objective = build_objective(config, torch.device("cpu"))
    branches = [single_branch(objective, config, b, 4) for b in config.branches]
    ages = []
    for n in range(7):
        crops = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        losses = losses_of(objective, branches, [crops], 0)
        objective.commit()
        for loss in losses:
            assert torch.isfinite(loss.total)
            monitors = {name: float(value) for name, value in loss.observe().scalars.items()}
            assert {"bank_age", "positive_similarity", "hardest_negative_similarity"} <= monitors.keys()
            assert -1.0 <= monitors["positive_similarity"] <= 1.0001
            assert -1.0 <= monitors["hardest_negative_similarity"] < 1.0, "its own key is not in the bank yet"
        ages.append(monitors["bank_age"])
    assert ages == [0, 1, 2, 3, 4, 5, 5]  # 8 keys a step, 40 places


def test_similarities_that_are_shown_are_those_of_the_loss() -> None:
    objective, built, crops = build([RESNET, VIT])
    losses = losses_of(objective, built, [crops], 0)
    for branch, loss in zip(built, losses, strict=True):
        positives, hardest = [], []
        with torch.no_grad():
            queries, keys = branch.student(crops).projected, branch.teacher(crops).projected
        for view in (0, 1):
            for b in range(B):
                positives.append(float(queries[view, b] @ keys[1 - view, b]))
                hardest.append(max(float(queries[view, b] @ key) for key in objective.banks[branch.name].keys))
        monitors = loss.observe().scalars
        assert float(monitors["positive_similarity"]) == pytest.approx(sum(positives) / len(positives), rel=1e-6)
        assert float(monitors["hardest_negative_similarity"]) == pytest.approx(sum(hardest) / len(hardest), rel=1e-6)


def test_monitors_reach_the_metrics_and_tensorboard_for_every_branch(beton: Path, tmp_path: Path) -> None:
    changes = {"optim__max_steps": 3, "logging__tensorboard": True}
    run = RunDirectory.create(tmp_path / "run", tiny_config(beton, **CONTRASTIVE, **changes))
    assert train_locally(run.path, 1) == EXIT_DONE
    logged = [record for record in read_metrics(run.metrics_file) if "images_seen" in record]
    board = EventAccumulator(str(run.tensorboard)).Reload()
    for branch in ("resnet", "vit"):
        assert [record[f"bank_age/{branch}"] for record in logged] == [0, 1, 2]
        for name in ("bank_age", "positive_similarity", "hardest_negative_similarity", "loss/{}/self", "loss/{}/cross"):
            key = name.format(branch) if "{}" in name else f"{name}/{branch}"
            shown = {event.step: event.value for event in board.Scalars(key)}
            assert shown == pytest.approx({record["step"]: record[key] for record in logged}), key


def test_bf16_storage_changes_the_loss_by_rounding_only() -> None:
    still = {**VIT, "drop_path": 0.0}
    exact, rounded = (
        build_objective(
            tiny_config(branches=[still], optim__global_batch=4, **CONTRASTIVE, objective__bank__storage=storage),
            torch.device("cpu"),
        )
        for storage in ("fp32", "bf16")
    )
    config = tiny_config(branches=[still])
    branch = single_branch(exact, config, config.branches[0], 4)
    for n in range(3):
        crops = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        a, b = (losses_of(objective, [branch], [crops], 0)[0].total for objective in (exact, rounded))
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0, atol=0.03)  # a bf16 unit vector is off by 1/512, over 0.07
        exact.commit()
        rounded.commit()
    banks = [objective.state_tensors()["bank/vit/keys"] for objective in (exact, rounded)]
    assert [bank.dtype for bank in banks] == [torch.float32, torch.bfloat16]
    assert torch.equal(banks[0].bfloat16(), banks[1])


@pytest.mark.parametrize("chunk", [1, 7, 40, 8192])
def test_info_nce_equals_the_reference_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    q, p, n = (nn.functional.normalize(torch.randn(r, 5, generator=generator).double(), dim=1) for r in (6, 6, 40))
    q, p, n = q.requires_grad_(), p.requires_grad_(), n.requires_grad_()
    rows, hardest = info_nce(q, p, n, 0.07)
    expected = reference.info_nce(q, p, n.detach(), 0.07)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hardest, (q @ n.T).amax(dim=1))
    assert not hardest.requires_grad
    weights = torch.arange(1.0, 7.0).double()
    wanted = torch.autograd.grad((expected * weights).sum(), [q, p])
    ours = torch.autograd.grad((rows * weights).sum(), [q, p, n], allow_unused=True)
    assert ours[2] is None, "negatives receive no gradient"
    for a, b in zip(ours[:2], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_info_nce_is_fp32_under_autocast_and_finite_when_all_agree() -> None:
    vectors = nn.functional.normalize(torch.randn(8, 16), dim=1)
    bank = nn.functional.normalize(torch.randn(300, 16), dim=1)
    plain, _ = info_nce(vectors, vectors, bank, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = info_nce(vectors, vectors, bank, 0.07)
    assert torch.equal(plain, under)
    same = vectors[:1].expand(8, 16)
    loss, _ = info_nce(same, same, vectors[:1].expand(300, 16), 0.001)
    torch.testing.assert_close(loss, torch.full((8,), math.log(301)), rtol=1e-4, atol=0)


def test_a_network_that_widens_its_pooled_feature_projects_the_mean_of_its_tokens() -> None:
    wide = {**RESNET, "name": "wide", "backbone": "mobilenetv3_small_050", "backbone_options": {}}
    config = tiny_config(branches=[wide, VIT], optim__global_batch=4, **CONTRASTIVE)
    objective = build_objective(config, torch.device("cpu"))
    branches = [single_branch(objective, config, b, 4) for b in config.branches]
    network = branches[0].student
    assert network.projects_mean
    losses = losses_of(objective, branches, [torch.randn(2, 4, 3, 32, 32)], 0)
    assert all(torch.isfinite(loss.total) for loss in losses)
    other = Seen(torch.randn(2, 4, 16), torch.randn(2, 4, 16, 16))
    out = network.eval()(torch.ones(2, 4, 3, 32, 32), dense=True, others=[other])
    assert out.dense.shape == (2, 4, 1, 16)  # one token: it is its own mean
    torch.testing.assert_close(out.projected, out.dense[:, :, 0])
    assert out.aligned[0].shape == (2, 4, 16)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective__bank__size": 15}, "objective.bank.size: 15, but a step brings 16 keys"),
        ({"views__local_crops__count": 2}, "set views.global_crops.count to 2 and views.local_crops.count to 0"),
        ({"views__global_crops__count": 3, "views__global_crops__solarize_probability": [0]}, "two views of an image"),
        ({"objective__bank__sise": 15}, "objective.bank.sise: unknown key; did you mean 'size'?"),
        ({"objective__storage": "fp16"}, "objective.storage: unknown key"),
        ({"objective__bank__storage": "fp16"}, "objective.bank.storage: given \"fp16\", expected 'fp32' or 'bf16'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(**{**CONTRASTIVE, **changes})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bank_larger_than_an_epochs_keys_is_refused_before_anything_starts(beton: Any) -> None:
    config = tiny_config(beton, **CONTRASTIVE, data__limit=19)
    with pytest.raises(UserError, match=r"objective.bank.size: 40, but 19 images bring 38 keys an epoch"):
        check(config, 1)
    check(tiny_config(beton, **CONTRASTIVE, data__limit=20), 1)


def test_the_name_alone_stands_for_all_defaults() -> None:
    config = tiny_config(objective="contrastive", views__local_crops__count=0).objective
    assert config.kind == "contrastive"
    assert (config.width, config.temperature, config.cross_weight, config.residual_weight) == (128, 0.07, 0.01, 0.5)
    assert (config.bank.size, config.bank.storage) == (65536, "fp32")
    assert tiny_config(objective={"prototypes": 7}).objective.kind == "dino"
