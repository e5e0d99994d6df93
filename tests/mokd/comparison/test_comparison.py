"""Which runs are compared with which, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.errors import UserError
from mokd.comparison.pairing import Run, differences, group, settings
from mokd.comparison.solo import solo
from tests.support import CONTRASTIVE, RESNET, SEED, VIT, frozen, tiny_config


def pair(name: str = "pair", **changes: Any) -> Run:
    return Run(Path("runs") / name, tiny_config(name=name, **changes))


def alone(branch: str, of: Run | None = None, **changes: Any) -> Run:
    config = solo((of or pair(**changes)).config, branch)
    return Run(Path("runs") / config.name, config)


def whole(**changes: Any) -> list[Run]:
    """A pair and its baselines."""
    together = pair(**changes)
    return [together, alone("resnet", together), alone("vit", together)]


def test_runs_are_told_apart_by_their_branches_in_any_order() -> None:
    runs = whole()
    methods, remarks = group(runs[::-1])
    assert remarks == []
    (method,) = methods
    assert method.label == "dino"
    assert dict(method.pair) == {3: runs[0]}
    assert {name: dict(side) for name, side in method.solo.items()} == {"resnet": {3: runs[1]}, "vit": {3: runs[2]}}
    assert method.same_seeds("vit")


def test_runs_that_differ_by_their_seed_belong_together() -> None:
    runs = [run for seed in (2, 0, 1) for run in whole(name=f"pair-{seed}", seed=seed)]
    (method,), remarks = group(runs)
    assert remarks == []
    assert list(method.pair) == list(method.solo["vit"]) == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"logging__every_steps": 7},
        {"checkpoint__keep_last": 9},
        {"data__workers": 5},
        {"parallel__threads_per_rank": 1},
        {"cluster": {"nodes": 2}},
        {"branches": [RESNET, {**VIT, "weight": 0.7}]},  # a baseline has no cross terms to weigh
        {"branches": [RESNET, {**VIT, "activation_checkpointing": True}]},
        {"objective__cross_temp_warmup_epochs": 3},
        {"objective__center_search": True},
        {"objective__terms__cross_search": False},
    ],
)
def test_what_a_baseline_need_not_share(changes: dict[str, Any]) -> None:
    together = pair()
    _, remarks = group([together, alone("resnet", together), alone("vit", **changes)])
    assert remarks == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__limit": 32}, "data.limit is 32 there, 40 here"),
        ({"data__train": "other.beton"}, "data.train is 'other.beton' there, 'none.beton' here"),
        ({"views__global_crops__area_scale": [0.5, 1.0]}, "views.global_crops.area_scale is [0.5, 1.0] there"),
        ({"optim__epochs": 4}, "optim.epochs is 4 there, 3 here"),
        ({"optim__global_batch": 4}, "optim.global_batch is 4 there, 8 here"),
        ({"objective__student_temp": 0.2}, "objective.student_temp is 0.2 there"),
        ({"branches": [RESNET, {**VIT, "drop_path": 0.0}]}, "branches.vit.drop_path is 0.0 there, 0.1 here"),
        ({"precision__compute": "bf16", "optim__epochs": 4}, "(and 1 more keys)"),
        ({"seed": 4}, "seeds of runs/pair are [3], of its baseline runs/pair-solo-vit [4]"),
        (CONTRASTIVE, "objective.kind is 'contrastive' there, 'dino' here"),
    ],
)
def test_what_differs_is_named_in_one_line_and_force_goes_on(changes: dict[str, Any], says: str) -> None:
    together = pair()
    runs = [together, alone("resnet", together), alone("vit", **changes)]
    with pytest.raises(UserError) as caught:
        group(runs)
    assert says in str(caught.value)
    assert "--force" in str(caught.value)
    assert "\n" not in str(caught.value)
    (method,), remarks = group(runs, force=True)
    assert len(remarks) == 1
    assert says in remarks[0]
    assert method.solo["vit"].keys() == {runs[2].config.seed}
    assert method.same_seeds("vit") is ("seed" not in changes)


def test_objectives_have_baselines_of_their_own() -> None:
    dino, contrastive = whole(), whole(name="con", **CONTRASTIVE)
    methods, remarks = group([*contrastive, *dino])
    assert remarks == []
    assert [method.label for method in methods] == ["contrastive", "dino"]
    assert [method.solo["vit"][3] for method in methods] == [contrastive[2], dino[2]]


def test_a_static_teacher_is_measured_against_the_baseline_of_the_branch_that_learns() -> None:
    branches = [VIT, frozen(RESNET)]
    beside, seed = pair(branches=branches), pair("seed", branches=branches, **SEED)
    methods, remarks = group([pair(), beside, seed, alone("vit"), alone("resnet")])
    assert [method.pair[3].path.name for method in methods] == ["pair", "pair", "seed"]
    assert [list(method.solo) for method in methods] == [["resnet", "vit"], ["vit"], ["vit"]]
    # a distillation alone has nothing to learn from: what differs in the objective is said, and no objection
    assert len(remarks) == 1
    assert remarks[0].startswith(
        "runs/pair-solo-vit, baseline of runs/seed, has other terms of its own: objective.kind"
    )
    with pytest.raises(UserError, match=r"runs/seed: optim\.epochs is"):
        group([pair("seed", branches=branches, **SEED), alone("vit", optim__epochs=5)])


def test_ablations_share_the_baselines_and_are_named_by_what_they_change() -> None:
    runs = whole()
    searchless = pair("searchless", objective__terms__cross_search=False)
    tokenless = pair("tokenless", objective__terms__self_thead=False)
    methods, remarks = group([*runs, searchless, tokenless])
    assert [m.label for m in methods] == ["dino", "dino terms.cross_search=False", "dino terms.self_thead=False"]
    assert all(method.solo["vit"][3] is runs[2] for method in methods)
    assert len(remarks) == 2  # one for each branch of the one whose own terms differ
    assert "has other terms of its own: objective.terms.self_thead" in remarks[0]
    # the baseline without that term is preferred where it is given
    exact = alone("vit", tokenless)
    methods, remarks = group([*runs, tokenless, exact])
    assert methods[1].solo["vit"][3] is exact
    assert methods[0].solo["vit"][3] is runs[2]
    assert len(remarks) == 1


def test_what_is_missing_is_named_with_the_command() -> None:
    together = pair()
    with pytest.raises(UserError, match=r"no run of vit alone .* mokd train runs/pair/config.yaml --solo vit$"):
        group([together, alone("resnet", together)])
    with pytest.raises(UserError, match="none of these runs has two branches"):
        group([alone("vit")])
    with pytest.raises(UserError, match="runs/pair and runs/copy are the same run, seed 3"):
        group([*whole(), pair("copy")])


def test_a_baseline_of_nothing_is_left_out_with_a_remark() -> None:
    other = alone("vit", pair("long", optim__epochs=9))
    (method,), remarks = group([*whole(), other])
    assert remarks == ["runs/long-solo-vit: a baseline of no pair run given; left out"]
    assert method.solo["vit"][3].path.name == "pair-solo-vit"


def test_settings_of_a_branch_in_company_are_those_of_its_baseline() -> None:
    together = pair(**CONTRASTIVE).config
    assert differences(settings(together, "vit"), settings(solo(together, "vit"))) == []
    assert "branches" in differences(settings(together), settings(solo(together, "vit")))
    assert not any(key.startswith(("objective.cross", "objective.residual")) for key in settings(together, "vit"))
