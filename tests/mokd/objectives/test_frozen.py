"""A frozen branch gives the targets of its first weights, learns nothing and costs no backward pass."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.core.errors import UserError
from mokd.checkpointing import state
from mokd.checkpointing.storage import publish
from mokd.config import RunConfig
from mokd.distributed.local_ranks import supervise, train_locally
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.models.backbones import timm_arguments
from mokd.objectives.base import build_objective
from mokd.objectives.branch import Branch, TeachingBranch, learning
from mokd.parallel.build import build_branch
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.runs.run_directory import RunDirectory
from mokd.training.step import TrainingStep
from mokd.weights import initial
from tests.support import CONTRASTIVE, REGRESSION, RESNET, SEED, THIRD, VIT, frozen, tiny_config

STEPS = 4


def with_frozen_resnet(beton: Path, folder: Path, **changes: Any) -> RunConfig:
    """A transformer learns beside a frozen ResNet, whose BatchNorm has statistics that it must keep."""
    file = folder / "resnet.pth"
    config = tiny_config(beton, branches=[VIT, frozen(RESNET, file)], optim__max_steps=STEPS, **changes)
    branch = config.branches[1]
    torch.manual_seed(4)
    net = timm.create_model(branch.backbone, **timm_arguments(branch, 32))
    with torch.no_grad():  # running statistics as of a trained network
        net.train()(torch.randn(8, 3, 32, 32) * 2 + 1)
    torch.save(net.state_dict(), file)
    return config


def final_state(run: RunDirectory) -> dict[str, torch.Tensor]:
    folder = run.checkpoints / f"step-{STEPS}"
    return {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"parallel__strategy": "ddp"}),
        (2, {"parallel__strategy": "fsdp"}),
        (2, CONTRASTIVE),
        (2, {**CONTRASTIVE, "parallel__strategy": "fsdp"}),
        (2, SEED),
        (1, REGRESSION),
    ],
    ids=["dino-1", "dino-ddp-2", "dino-fsdp-2", "contrastive-2", "contrastive-fsdp-2", "seed-2", "regression-1"],
)
def test_it_keeps_its_bits_and_a_resumed_run_is_the_same(
    ranks: int, changes: dict[str, Any], beton: Path, tmp_path: Path
) -> None:
    config = with_frozen_resnet(beton, tmp_path, **changes)
    whole, cut = (initial.create_run(tmp_path / name, config) for name in ("whole", "cut"))
    assert train_locally(whole.path, ranks) == EXIT_DONE
    program = [sys.executable, "-m", "tests.programs.train_until", str(cut.path), "2"]
    assert supervise(program, ranks) == EXIT_STOPPED
    assert train_locally(cut.path, ranks) == EXIT_DONE
    expected, found = final_state(whole), final_state(cut)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    # no student, no optimizer, and the weights and statistics that it was given
    own = {key.partition("/")[2]: value for key, value in found.items() if key.startswith("branch-resnet.")}
    assert {key.partition(".")[0] for key in own} == {"teacher"}
    given = load_file(cut.initial_weights / "resnet.safetensors")
    assert len(given) > 50
    assert [key for key, value in given.items() if not torch.equal(own[f"teacher.{key}"], value)] == []
    # while the other branch has learnt
    student = "branch-vit.safetensors/student.backbone.net.cls_token"
    teacher = "branch-vit.safetensors/teacher.backbone.net.cls_token"
    assert not torch.equal(found[student], found[teacher])


def build(config: RunConfig) -> tuple[Any, list[TeachingBranch]]:
    objective = build_objective(config, torch.device("cpu"))
    branches = [
        build_branch(config, branch, objective, torch.device("cpu"), images_per_rank=4, epoch_steps=5)
        for branch in config.branches
    ]
    return objective, branches


def views_of(config: RunConfig) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    groups = [(group.count, group.size_px) for group in config.views.groups]
    return [torch.randn(v, 4, 3, s, s, generator=generator) for v, s in groups if v]


def backward_flops(config: RunConfig) -> int:
    """Floating-point operations of the backward passes of a step."""
    objective, branches = build(config)
    views = views_of(config)
    taught = objective.teach(branches, views, 0)
    total = 0
    for branch in learning(branches):
        loss = objective.loss(branch, branches, taught, views, 0).total
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        total += counter.get_total_flops()
    for branch in branches:
        if not isinstance(branch, Branch):
            assert all(p.grad is None and not p.requires_grad for p in branch.teacher.parameters())
            assert not branch.teacher.training
    return total


def test_it_costs_no_backward_pass_and_no_optimizer() -> None:
    alone = backward_flops(tiny_config(branches=[VIT]))
    assert alone > 0
    assert backward_flops(tiny_config(branches=[VIT, frozen(THIRD)])) == alone
    assert backward_flops(tiny_config(branches=[VIT, THIRD])) > 2 * alone
    _, (learner, still) = build(tiny_config(branches=[VIT, frozen(THIRD)]))
    assert isinstance(learner, Branch)
    assert vars(still).keys() == {"config", "name", "teacher", "whole_teacher_backbone"}


def bytes_held(config: RunConfig) -> tuple[int, int]:
    """What tensors hold after two steps: all of them, and the networks of frozen branches."""

    def alive() -> list[torch.Tensor]:
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    # left out below: among those of other tests are some of compiled graphs, which have no storage to look at
    before = alive()
    known = set(map(id, before))
    objective, branches = build(config)
    step = TrainingStep(config, branches, objective, StopRequest(), Ranks(), torch.device("cpu"), 5)
    for number in range(2):
        step.run(number, views_of(config), epoch=0, measure=False)
    still = [branch.teacher for branch in branches if not isinstance(branch, Branch)]
    new = [t for t in alive() if id(t) not in known]
    new += [t.grad for t in new if t.is_leaf and t.grad is not None]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new}
    return sum(held.values()), sum(t.nbytes for network in still for t in network.state_dict().values())


@pytest.mark.parametrize("changes", [{}, CONTRASTIVE], ids=["dino", "contrastive"])
def test_after_a_step_nothing_is_held_of_it_but_its_weights(changes: dict[str, Any]) -> None:
    """No moments of an optimizer, no second network, no activations."""
    configs = [
        tiny_config(branches=branches, optim__global_batch=4, **changes)
        for branches in ([VIT], [VIT, frozen(THIRD)], [VIT, THIRD])
    ]
    bytes_held(configs[1])  # what is made once and kept
    (alone, _), (beside, weights), (both, _) = map(bytes_held, configs)
    assert weights > 100_000
    # its centers or its bank, and what the other branch needs to learn from it
    own = 0 if changes == {} else other_parts(configs[1])
    assert 0 <= beside - alone - weights - own < 0.02 * weights
    assert both - alone > 3 * weights


def other_parts(config: RunConfig) -> int:
    """Of the contrastive objective: the bank, and the learning branch's extraction and alignment with all they need."""
    objective, (learner, _) = build(config)
    bank = sum(t.nbytes for key, t in objective.state_tensors().items() if "vit_wide" in key)
    alone = build(tiny_config(branches=[VIT], **CONTRASTIVE))[1][0]
    assert isinstance(learner, Branch)
    assert isinstance(alone, Branch)
    more = [sum(p.nbytes for p in branch.student.parameters()) for branch in (learner, alone)]
    return bank + 4 * (more[0] - more[1])  # student, two moments, teacher


@pytest.mark.parametrize("changes", [{}, CONTRASTIVE])
def test_its_targets_are_those_of_a_learning_branch_with_the_same_weights(changes: dict[str, Any]) -> None:
    """Transformers compute the same in evaluation mode: what the other branch learns is then the same too."""
    pair, half = (tiny_config(branches=[VIT, third], **changes) for third in (THIRD, frozen(THIRD)))
    (both, (_, other)), (one, (learner, still)) = build(pair), build(half)
    weights = {key: value for key, value in other.teacher.state_dict().items() if key in still.teacher.state_dict()}
    still.teacher.load_state_dict(weights)
    losses = []
    for objective, branches in ((both, build(pair)[1]), (one, [learner, still])):
        branches = branches if objective is one else [branches[0], other]
        taught = objective.teach(branches, views_of(pair), 0)
        torch.manual_seed(0)  # stochastic depth
        losses.append(objective.loss(branches[0], branches, taught, views_of(pair), 0).terms)
    assert losses[0].keys() == losses[1].keys()
    assert len(losses[0]) >= 2
    for term, value in losses[0].items():
        torch.testing.assert_close(losses[1][term], value, rtol=1e-6, atol=0)


def test_its_heads_are_drawn_by_seed_and_name_and_its_center_follows_them() -> None:
    config = tiny_config(branches=[VIT, frozen(THIRD)])
    objective, branches = build(config)
    _, (_, again) = build(config)
    own, same = branches[1].teacher.state_dict(), again.teacher.state_dict()
    assert all(torch.equal(own[key], same[key]) for key in own)
    views = views_of(config)
    said = branches[1].teacher(views[:1])
    objective.remember(objective.teach(branches, views, 0))
    objective.commit()
    for head, output in enumerate((said.mlp, said.t_head)):
        mean = output.logits().mean(dim=(0, 1))
        torch.testing.assert_close(objective.centers[1, head], mean * (1 - config.objective.center_momentum))


@pytest.mark.parametrize(("changes", "follow"), [(SEED, True), (CONTRASTIVE, False)])
def test_statistics_of_a_teacher_that_sees_no_batches_follow_the_students(
    changes: dict[str, Any], follow: bool
) -> None:
    config = tiny_config(branches=[RESNET, frozen(VIT)], **changes)
    objective, branches = build(config)
    (branch,) = learning(branches)
    views = views_of(config)
    taught = objective.teach(branches, views, 0)
    objective.loss(branch, branches, taught, views, 0)
    student, teacher = (network.backbone.net.bn1 for network in (branch.student, branch.teacher))
    before = teacher.running_mean.clone()
    branch.update_teacher(0.9)
    moved = torch.lerp(before, student.running_mean, 0.1)
    torch.testing.assert_close(teacher.running_mean, moved if follow else before)
    assert int(teacher.num_batches_tracked) == 1
    assert torch.equal(moved, before) is not follow


@pytest.mark.parametrize(
    ("same", "changes"), [(True, {}), (False, {"objective__prototypes": 24})], ids=["same shapes", "other prototypes"]
)
def test_of_a_run_it_takes_the_heads_where_they_fit(
    same: bool, changes: dict[str, Any], beton: Path, tmp_path: Path
) -> None:
    first = RunDirectory.create(tmp_path / "first", tiny_config(beton, branches=[THIRD]))
    objective, branches = build(first.config())
    trained = state.collect(branches, objective, main=True)
    publish(first, 0, 5, trained, {})
    still = {**THIRD, "name": "still", "frozen": True, "init": f"run:{first.path}/vit_wide"}
    config = tiny_config(beton, branches=[VIT, still], **changes)
    run = initial.create_run(tmp_path / "run", config)
    _, built = build(config)
    before = {key: value.clone() for key, value in built[1].teacher.state_dict().items()}
    initial.load(run, config, built)
    for key, value in built[1].teacher.state_dict().items():
        given = trained["branch-vit_wide"][f"teacher.{key}"]
        taken = same or key.startswith("backbone.")
        assert torch.equal(value, given if taken else before[key]), key
    # heads drawn under another name are others: what was compared could differ
    assert not torch.equal(before["mlp_head.mlp.0.weight"], trained["branch-vit_wide"]["teacher.mlp_head.mlp.0.weight"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"branches": [frozen(VIT), frozen(RESNET)]}, "all of them are frozen"),
        ({"branches": [RESNET, {**VIT, "frozen": True}]}, "frozen: gives the targets of the weights that init names"),
        ({"branches": [{k: v for k, v in VIT.items() if k != "optimizer"}]}, "only a frozen branch has none"),
        (
            {"branches": [VIT, frozen(RESNET)], "objective__terms": {"cross_mlp": False, "cross_search": False}},
            "only they",
        ),
        ({"branches": [VIT, RESNET], **SEED}, "objective seed: learns from frozen branches"),
        ({"branches": [VIT, frozen(RESNET)], **SEED, "views__local_crops__count": 3}, "has no local views"),
        ({"branches": [VIT, frozen(RESNET)], **SEED, "objective__queue": {"size": 8}}, "a step brings 16 features"),
    ],
)
def test_what_cannot_work_is_said(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)
