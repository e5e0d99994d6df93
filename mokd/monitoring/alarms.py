"""From logged numbers to alarms: rules with thresholds, pure functions of the records in `metrics.jsonl`.

So a run that is resumed gives the same alarms at the same steps: `Rules` is shown the records up to there again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mokd.config import ContrastiveConfig, DinoConfig, RunConfig

Record = Mapping[str, Any]

GRACE_STEPS = 1000  # at most, in which a young network may look collapsed


# what a rule sees in one record: the alarm's name, `<rule>/<branch>`, and advice: what is wrong, the key to change
Sign = tuple[str, str]


@dataclass(frozen=True)
class Alarm:
    """A sign that was there for `logging.alarms.patience` logged steps in a row, at the last of them."""

    step: int
    alarm: str
    advice: str


class Rules:
    """Shown one record after the other, says which alarms are new. An alarm is new again once its sign was gone."""

    def __init__(self, config: RunConfig, epoch_steps: int) -> None:
        self._config, self._limits = config, config.logging.alarms
        first = self._limits.from_step
        self._from_step = min(epoch_steps, GRACE_STEPS) if first is None else first
        self._seen: dict[str, int] = {}  # logged steps in a row
        self._ranks: dict[str, list[float]] = {}  # the newest effective ranks of a branch
        self._best: dict[str, float] = {}

    @property
    def active(self) -> list[str]:
        """Names of the alarms whose sign is still there."""
        return [name for name, count in self._seen.items() if count >= self._limits.patience]

    def observe(self, record: Record) -> list[Alarm]:
        """The new alarms. Records of evaluations, which have no speed, say nothing."""
        if "images_per_second" not in record:
            return []
        signs = dict(self._signs(record))
        self._seen = {name: self._seen.get(name, 0) + 1 for name in signs}
        due = [name for name, count in self._seen.items() if count == self._limits.patience]
        return [Alarm(int(record["step"]), name, signs[name]) for name in due]

    def _signs(self, record: Record) -> Iterator[Sign]:
        yield from self._of_time(record)
        for branch in self._config.branches:
            yield from self._of_mechanics(record, branch.name)
            if record["step"] > self._from_step:
                yield from self._of_targets(record, branch.name)
                yield from self._of_features(record, branch.name)
                yield from self._of_terms(record, branch.name)

    def _of_time(self, record: Record) -> Iterator[Sign]:
        limits = self._limits
        waits, rank = record.get("data_wait_fraction"), int(record.get("data_wait_rank", 0))
        if limits.data_wait is not None and waits is not None and waits > limits.data_wait:
            yield (
                "data_wait",
                f"rank {rank} waits for data for {100 * waits:.0f}% of the time, and all others with it; raise "
                "data.workers, or convert to smaller images (mokd convert --max-resolution)",
            )
        excess = record.get("slow_rank_excess")
        if limits.slow_rank is not None and excess is not None and excess > limits.slow_rank:
            yield (
                "slow_rank",
                f"rank {int(record['slow_rank'])} takes longer than the others by {100 * excess:.0f}% of a step, in "
                "its loader or optimizer; look at its node (mokd doctor), or leave it out (cluster.exclude)",
            )

    def _of_mechanics(self, record: Record, branch: str) -> Iterator[Sign]:
        """What is wrong at any step, the first included."""
        norm, limit = record.get(f"gradient_norm/{branch}"), self._limits.gradient_norm
        if limit is not None and norm is not None and norm < limit:
            yield (
                f"dead_branch/{branch}",
                f"{branch} gets no gradient (norm {norm:.1e}); turn a term of objective.terms on, or look at "
                f"branches.{branch}.backbone and branches.{branch}.optimizer",
            )
        frozen, saturated = self._limits.center_frozen, self._saturated(record, branch)
        for key, change in _of_branch(record, "center_change", branch):
            if frozen is not None and change < frozen and key not in saturated:  # with nothing to center, it may stand
                yield (
                    f"center_frozen/{key}",
                    f"the center of {key} stands still; lower objective.center_momentum "
                    f"({self._config.objective.model_dump().get('center_momentum')} now)",
                )

    def _saturated(self, record: Record, branch: str) -> dict[str, float]:
        """Heads whose targets are uniform, with their entropies."""
        limit = self._limits.entropy_saturated
        entropies = _of_branch(record, "teacher_entropy", branch)
        return {key: e for key, e in entropies if limit is not None and e > limit * self._ln_k()}

    def _of_targets(self, record: Record, branch: str) -> Iterator[Sign]:
        """One sign for a head at most: uniform and collapsed targets are constant too."""
        limits, ln_k = self._limits, self._ln_k()
        saturated, entropies = self._saturated(record, branch), dict(_of_branch(record, "teacher_entropy", branch))
        for key, used in _of_branch(record, "prototypes_in_use", branch):
            spread = math.log(max(used, 1.0))
            if key in saturated:
                yield (
                    f"entropy_saturated/{key}",
                    f"the targets of {key} are uniform (entropy {saturated[key]:.3f} of ln K = {ln_k:.3f}): they say "
                    "nothing; lower objective.teacher_temp, or optim.teacher_momentum while the network is young",
                )
            elif limits.entropy_collapsed is not None and spread < limits.entropy_collapsed * ln_k:
                yield (
                    f"entropy_collapsed/{key}",
                    f"all targets of {key} lie on {used:.1f} prototypes; lower objective.center_momentum, raise "
                    f"objective.teacher_temp, or lower branches.{branch}.optimizer.lr",
                )
            elif limits.targets_constant is not None and spread - entropies.get(key, 0.0) < limits.targets_constant:
                yield (
                    f"targets_constant/{key}",
                    f"the targets of {key} are the same whatever the image is; lower branches.{branch}.optimizer.lr, "
                    "or raise optim.warmup_epochs",
                )

    def _of_features(self, record: Record, branch: str) -> Iterator[Sign]:
        limits, spread = self._limits, record.get(f"feature_spread/{branch}")
        if limits.feature_spread is not None and spread is not None and spread < limits.feature_spread:
            yield (
                f"feature_spread/{branch}",
                f"the features of {branch} are the same whatever the image is (spread {spread:.4f}, 1 were healthy); "
                f"lower branches.{branch}.optimizer.lr, or raise optim.warmup_epochs",
            )
        # of what differs between images: a large common part is no collapse
        rank = record.get(f"feature_rank_centered/{branch}")
        if rank is None:
            return
        newest = self._ranks[branch] = [*self._ranks.get(branch, []), rank][-limits.patience :]
        if len(newest) == limits.patience:  # a rank that it has held, not a moment's
            self._best[branch] = max(self._best.get(branch, 0.0), min(newest))
        best = self._best.get(branch, 0.0)
        if limits.feature_rank is not None and rank < limits.feature_rank:
            yield (
                f"feature_rank/{branch}",
                f"the features of {branch} differ along one direction only (effective rank {rank:.2f}); lower "
                f"branches.{branch}.optimizer.lr, or raise optim.warmup_epochs",
            )
        elif limits.feature_rank_fall is not None and rank < limits.feature_rank_fall * best:
            yield (
                f"feature_rank_fall/{branch}",
                f"the effective rank of the features of {branch} has fallen from {best:.0f} to {rank:.1f}; go back "
                f"(mokd resume RUN --from-step N) with a lower branches.{branch}.optimizer.lr",
            )

    def _of_terms(self, record: Record, branch: str) -> Iterator[Sign]:
        limits, ln_k = self._limits, self._ln_k()
        for term in ("self", "self_mlp", "self_thead"):
            loss = record.get(f"loss/{branch}/{term}")
            if limits.loss_at_ln_k is None or loss is None or abs(loss - ln_k) > limits.loss_at_ln_k * ln_k:
                continue
            yield (
                f"loss_at_ln_k/{branch}/{term}",
                f"{term} of {branch} sits at ln K = {ln_k:.3f}: it guesses; lower {self._temperature()}, or change "
                f"branches.{branch}.optimizer.lr",
            )
        ratio = record.get(f"cross_to_self/{branch}")
        if limits.cross_to_self is not None and ratio is not None and ratio > limits.cross_to_self:
            yield (
                f"cross_dominates/{branch}",
                f"the cross terms of {branch} weigh {ratio:.0f} times its self terms; lower branches.{branch}.weight",
            )

    def _ln_k(self) -> float:
        """Of the terms that guess there; nothing compares with it where an objective has none of them."""
        objective = self._config.objective
        if isinstance(objective, ContrastiveConfig):
            return math.log(objective.bank.size + 1)
        return math.log(objective.prototypes) if isinstance(objective, DinoConfig) else math.inf

    def _temperature(self) -> str:
        contrastive = isinstance(self._config.objective, ContrastiveConfig)
        return "objective.temperature" if contrastive else "objective.teacher_temp"


def _of_branch(record: Record, name: str, branch: str) -> list[tuple[str, float]]:
    """`<branch>` or `<branch>/<head>`, and the value, of every number of this name; null ones are left out."""
    keys = [key for key in record if key == f"{name}/{branch}" or key.startswith(f"{name}/{branch}/")]
    return [(key.removeprefix(f"{name}/"), record[key]) for key in keys if record[key] is not None]


def replay(rules: Rules, records: Sequence[Record]) -> None:
    """Brings rules to where they were after these records; the alarms of that time are known already."""
    for record in records:
        rules.observe(record)
