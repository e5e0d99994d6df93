"""What means something only beside another branch, and what that asks of the rest of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.core.schema import StrictModel
from mokd.config.ramps import factor

if TYPE_CHECKING:
    from mokd.config.objectives import DinoConfig
    from mokd.config.run import RunConfig

# keys of the objective over prototypes, and of its branches, that a branch alone must leave at their defaults
OF_OBJECTIVE = ("match_prototypes", "cross_gate")
OF_BRANCH = ("cross_student_temp", "cross_target")
CROSS_TERMS = ("cross_mlp", "cross_search")  # of the MLP head and of the T-Head
# one matrix of all pairs of prototypes lies in the first rank's memory, 0.5 GB at this number
MATCHED_AT_MOST = 8192


def check_company(objective: DinoConfig, run: RunConfig) -> None:
    """ValueError when a key of `OF_OBJECTIVE` or `OF_BRANCH` has nothing to act on."""
    on = [term for term in CROSS_TERMS if getattr(objective.terms, term)]
    given = [f"objective.{key}" for key in _given(objective, OF_OBJECTIVE)]
    for branch in run.branches:
        keys = [f"branches.{branch.name}.{key}" for key in _given(branch, OF_BRANCH)]
        if keys and branch.frozen:
            raise ValueError(f"{keys[0]}: a frozen branch learns nothing; remove it")
        if branch.cross_target != "others" and on == ["cross_search"]:
            raise ValueError(f"branches.{branch.name}.cross_target: objective.terms.cross_mlp is off; remove it")
        given += keys
    for key in given:
        if len(run.branches) == 1:
            raise ValueError(f"{key}: means nothing to a branch alone; remove it")
        if not on:
            raise ValueError(f"{key}: both cross terms are off; remove it")
    if objective.match_prototypes is not None:
        _check_matching(objective, run, on)


def _check_matching(objective: DinoConfig, run: RunConfig, on: list[str]) -> None:
    key = "objective.match_prototypes"
    if objective.prototypes > MATCHED_AT_MOST:
        raise ValueError(
            f"{key}: takes at most {MATCHED_AT_MOST} prototypes, and objective.prototypes is {objective.prototypes}"
        )
    if all(_counts_at_once(objective, run, term) for term in on):
        raise ValueError(
            f"{key}: {' and '.join(on)} count from the first step, when nothing has been seen to match by; give "
            f"objective.ramps.{on[0]} a start"
        )


def _counts_at_once(objective: DinoConfig, run: RunConfig, term: str) -> bool:
    epochs = run.optim.epochs
    weights = [b.weight * factor(b.weight_ramp, 0, epochs) for b in run.branches if not b.frozen]
    return factor(getattr(objective.ramps, term), 0, epochs) * max(weights) > 0.0


def _given(section: StrictModel, keys: tuple[str, ...]) -> list[str]:
    """Those of a section's keys that have another value than their default."""
    return [key for key in keys if getattr(section, key) != type(section).model_fields[key].default]
