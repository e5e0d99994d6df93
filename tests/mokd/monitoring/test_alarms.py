"""Rules over records: when an alarm comes, when it is new again, what it advises."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from mokd.config import RunConfig
from mokd.monitoring.alarms import Alarm, Rules, replay
from tests.support import CONTRASTIVE, tiny_config

LN_K = math.log(40)


def record(step: int, **changes: float | None) -> dict[str, Any]:
    """Of a healthy run; `changes` have '__' for '/'."""
    values: dict[str, float | None] = {"data_wait_fraction": 0.1, "slow_rank": 1, "slow_rank_excess": 0.01}
    for branch in ("resnet", "vit"):
        of_branch = {
            "cross_to_self": 0.5,
            "feature_rank_centered": 20.0,
            "feature_spread": 0.5,
            "gradient_norm": 1.0,
            "target_kl": 0.1,
        }
        values |= {f"{name}/{branch}": value for name, value in of_branch.items()}
        for head in (branch, f"{branch}/t_head"):
            of_head = {"teacher_entropy": 2.0, "prototypes_in_use": 30.0, "center_change": 0.1}
            values |= {f"{name}/{head}": value for name, value in of_head.items()}
        values |= {f"loss/{branch}/{term}": 3.0 for term in ("self_mlp", "self_thead")}
    values |= {key.replace("__", "/"): value for key, value in changes.items()}
    return {"step": step, "images_per_second": 100.0, **values}


def rules(**changes: Any) -> Rules:
    return Rules(config(**changes), epoch_steps=5)


def config(**changes: Any) -> RunConfig:
    return tiny_config(**{"logging__alarms": {"from_step": 0, "patience": 3}, **changes})


def shown(to: Rules, count: int, first: int = 1, **changes: float | None) -> list[Alarm]:
    return [alarm for step in range(first, first + count) for alarm in to.observe(record(step, **changes))]


FAULTS = {
    "entropy_saturated/vit": {"teacher_entropy__vit": LN_K - 1e-4, "prototypes_in_use__vit": 39.999},
    "entropy_collapsed/vit/t_head": {"teacher_entropy__vit__t_head": 0.01, "prototypes_in_use__vit__t_head": 1.02},
    "targets_constant/resnet": {"teacher_entropy__resnet": math.log(30.0) - 1e-5},
    "center_frozen/resnet/t_head": {"center_change__resnet__t_head": 0.0},
    "feature_rank/vit": {"feature_rank_centered__vit": 1.05},
    "feature_spread/vit": {"feature_spread__vit": 1e-4},
    "loss_at_ln_k/vit/self_mlp": {"loss__vit__self_mlp": LN_K + 1e-3},
    "cross_dominates/vit": {"cross_to_self__vit": 12.0},
    "dead_branch/resnet": {"gradient_norm__resnet": 0.0},
    "data_wait": {"data_wait_fraction": 0.9, "data_wait_rank": 3},
    "slow_rank": {"slow_rank_excess": 0.5, "slow_rank": 7},
}


@pytest.mark.parametrize("alarm", FAULTS)
def test_an_alarm_comes_with_patience_once_and_again_when_it_was_gone(alarm: str) -> None:
    watched = rules()
    assert shown(watched, 10) == []
    assert shown(watched, 2, 11, **FAULTS[alarm]) == []
    assert [(a.step, a.alarm) for a in shown(watched, 8, 13, **FAULTS[alarm])] == [(13, alarm)]
    assert watched.active == [alarm]
    assert shown(watched, 1, 21) == []
    assert watched.active == []
    assert [(a.step, a.alarm) for a in shown(watched, 8, 22, **FAULTS[alarm])] == [(24, alarm)]


@pytest.mark.parametrize("alarm", FAULTS)
def test_the_advice_names_a_key_that_exists(alarm: str) -> None:
    (found,) = shown(rules(), 3, **FAULTS[alarm])
    document = {**config().model_dump(mode="json"), "cluster": {"exclude": None}}
    keys = re.findall(r"\b(?:objective|optim|branches|data|cluster)(?:\.\w+)+", found.advice)
    assert keys
    for key in keys:
        node: Any = document
        for part in key.split("."):
            node = {b["name"]: b for b in node}[part] if isinstance(node, list) else node
            if not isinstance(node, dict) or part not in node:
                assert part in ("resnet", "vit"), key
                continue
            node = node[part]


def test_ranks_are_named() -> None:
    assert "rank 3 waits for data for 90%" in shown(rules(), 3, **FAULTS["data_wait"])[0].advice
    assert "rank 7 takes longer than the others by 50%" in shown(rules(), 3, **FAULTS["slow_rank"])[0].advice


def test_a_rank_that_falls() -> None:
    watched = rules()
    assert shown(watched, 5, feature_rank_centered__vit=80.0) == []
    assert shown(watched, 5, 6, feature_rank_centered__vit=40.0) == []
    (found,) = shown(watched, 5, 11, feature_rank_centered__vit=7.5)
    assert (found.step, found.alarm) == (13, "feature_rank_fall/vit")
    assert "from 80 to 7.5" in found.advice


def test_a_young_network_may_look_collapsed_and_a_dead_one_may_not() -> None:
    watched = rules(logging__alarms={"patience": 3})
    young = {**FAULTS["entropy_saturated/vit"], **FAULTS["feature_rank/vit"], **FAULTS["dead_branch/resnet"]}
    found = [(alarm.step, alarm.alarm) for alarm in shown(watched, 10, **young)]
    assert found == [
        (3, "dead_branch/resnet"),
        (8, "entropy_saturated/vit"),
        (8, "feature_rank/vit"),
    ]  # epochs: 5 steps


@pytest.mark.parametrize("alarm", FAULTS)
def test_null_turns_a_rule_off(alarm: str) -> None:
    name = {"cross_dominates": "cross_to_self", "dead_branch": "gradient_norm"}.get(alarm.split("/")[0])
    off = {"from_step": 0, name or alarm.split("/")[0]: None}
    if alarm.startswith("entropy"):
        off["targets_constant"] = None  # which they are too
    assert shown(rules(logging__alarms=off), 9, **FAULTS[alarm]) == []


def test_missing_and_null_numbers_and_evaluations_say_nothing() -> None:
    watched = rules()
    for step in range(1, 9):
        empty = dict.fromkeys(record(step), None)
        assert watched.observe({**empty, "step": step, "images_per_second": 1.0}) == []
        assert watched.observe({"step": step, "images_per_second": 1.0}) == []
    shown(watched, 2, **FAULTS["data_wait"])
    assert watched.observe({"step": 2, "eval/vit/knn_top1": 50.0}) == []
    assert [alarm.alarm for alarm in shown(watched, 1, 3, **FAULTS["data_wait"])] == ["data_wait"]


def test_a_resumed_run_has_the_alarms_of_the_whole_one() -> None:
    records = [
        record(s, **(FAULTS["dead_branch/resnet"] if s % 11 > 3 else {}), feature_rank_centered__vit=400.0 / s**2)
        for s in range(1, 30)
    ]
    whole = rules()
    expected = [alarm for r in records for alarm in whole.observe(r)]
    assert len(expected) > 3
    for cut in range(len(records)):
        resumed = rules()
        replay(resumed, records[:cut])
        found = [alarm for r in records[cut:] for alarm in resumed.observe(r)]
        assert found == [alarm for alarm in expected if alarm.step > cut]


def test_the_contrastive_loss_sits_at_ln_of_bank_and_positive() -> None:
    watched = Rules(config(**CONTRASTIVE), epoch_steps=5)
    seen = {"step": 1, "images_per_second": 1.0, "loss/vit/self": math.log(41)}
    found = [alarm for step in range(1, 5) for alarm in watched.observe({**seen, "step": step})]
    assert [(alarm.step, alarm.alarm) for alarm in found] == [(3, "loss_at_ln_k/vit/self")]
    assert "objective.temperature" in found[0].advice
