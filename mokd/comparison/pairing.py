"""Which runs belong together: pair runs with the solo baselines of their branches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from mokd.config import DistillationConfig, RunConfig
from mokd.config.leaves import leaves
from mokd.runs.run_directory import RunDirectory

Settings = Mapping[str, Any]

# what changes neither what is learnt nor how it is measured: where and how fast a run is computed, and its name
_IRRELEVANT = (
    r"name|seed|cluster|checkpoint|logging|parallel|execution|data\.(workers|batches_ahead|batch_timeout_seconds)"
    r"|evaluation\.(every_epochs|batch|probe_images)"
)
# what has a meaning only in company
_CROSS = r"objective\.((terms|ramps)\.cross_\w+|cross_\w+|center_search|residual_weight)"
# an ablation is compared with the baseline that has all terms of its own
_TERMS = "objective.terms."
# what distils frozen branches has no baseline of its own kind: alone, nothing is left to learn from
_DISTILLED = re.compile(r"objective\.|views\.local_crops\.|branches\.[\w-]+\.(mlp_head|t_head_group|teacher_temp_)")


@dataclass(frozen=True)
class Run:
    """A run to compare."""

    path: Path
    config: RunConfig

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in a directory; UserError when it is none."""
        return cls(path, RunDirectory.open(path).config())

    @property
    def branches(self) -> list[str]:
        """Names of its branches that learn."""
        return [branch.name for branch in self.config.branches if not branch.frozen]


Seeds = Mapping[int, Run]


@dataclass(frozen=True)
class Method:
    """A configuration of several branches: its runs by seed, and for each branch those of that branch alone."""

    label: str
    pair: Seeds
    solo: Mapping[str, Seeds]

    def same_seeds(self, branch: str) -> bool:
        """Whether every run of the pair has its baseline of the same seed."""
        return self.pair.keys() == self.solo[branch].keys()


def settings(config: RunConfig, branch: str | None = None) -> dict[str, Any]:
    """Everything that two runs must share to differ by the seed only, as `key.path: value`.

    branch: what the run of that branch alone must have; the values that matter only in company are left out, as they
    are for a configuration of one branch.
    """
    document = config.model_dump(mode="json")
    branches = {b.pop("name"): b for b in document.pop("branches")}
    if branch is not None:
        branches = {branch: branches[branch]}
    alone = len(branches) == 1
    for values in branches.values():
        del values["activation_checkpointing"]
        if alone:
            for key in ("weight", "weight_ramp"):
                del values[key]
    left_out = re.compile(rf"({_IRRELEVANT}|{_CROSS})(\..*)?" if alone else rf"({_IRRELEVANT})(\..*)?")
    flat = {key: value for key, value in leaves(document) if not left_out.fullmatch(key)}
    return {**flat, "branches": sorted(branches), **dict(leaves(branches, "branches"))}


def differences(a: Settings, b: Settings) -> list[str]:
    """The keys in which two runs differ, the objective's kind first."""
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return sorted(keys, key=lambda key: key != "objective.kind")


def group(runs: Sequence[Run], *, force: bool = False) -> tuple[list[Method], list[str]]:
    """The methods among `runs`, in the order given, and what is to be said about them.

    UserError, naming the first key that differs, when a pair run has no baseline of the same data, views, schedule and
    seeds; with `force` that is said and the nearest baseline taken.
    """
    sides = _by_settings(runs)
    pairs = [side for side in sides if len(side[0].config.branches) > 1]
    solos = [side for side in sides if len(side[0].config.branches) == 1]
    if not pairs:
        raise UserError("compare: none of these runs has two branches or more; give a pair run, then its baselines")
    remarks: list[str] = []
    methods = []
    for label, pair in zip(_labels([side[0].config for side in pairs]), pairs, strict=True):
        found = {name: _baseline(pair, name, solos, force, remarks) for name in pair[0].branches}
        methods.append(Method(label, _by_seed(pair), {name: _by_seed(side) for name, side in found.items()}))
    used = {run.path for method in methods for side in method.solo.values() for run in side.values()}
    unused = [run for side in solos for run in side if run.path not in used]
    return methods, [*remarks, *(f"{run.path}: a baseline of no pair run given; left out" for run in unused)]


def baselines(pair: Run, known: Iterable[Run]) -> list[Run]:
    """Of every branch of a pair the run alone with the same seed and all else equal; empty unless all are known."""
    alone = [run for run in known if len(run.config.branches) == 1 and run.config.seed == pair.config.seed]
    found = []
    for branch in pair.branches if len(pair.config.branches) > 1 else []:
        wanted = settings(pair.config, branch)
        match = next((run for run in alone if run.branches == [branch] and settings(run.config) == wanted), None)
        if match is None:
            return []
        found.append(match)
    return found


def _by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ by their seed only, together; UserError when two do not even differ by that."""
    sides: list[tuple[Settings, list[Run]]] = []
    for run in runs:
        wanted = settings(run.config)
        side = next((side for known, side in sides if known == wanted), None)
        if side is None:
            sides.append((wanted, [run]))
            continue
        twin = next((other for other in side if other.config.seed == run.config.seed), None)
        if twin is not None:
            seed = run.config.seed
            raise UserError(f"compare: {twin.path} and {run.path} are the same run, seed {seed}; leave one out")
        side.append(run)
    return [side for _, side in sides]


def _by_seed(side: Iterable[Run]) -> dict[int, Run]:
    return {run.config.seed: run for run in sorted(side, key=lambda run: run.config.seed)}


def _baseline(pair: list[Run], branch: str, solos: Sequence[list[Run]], force: bool, remarks: list[str]) -> list[Run]:
    """The solo runs of a branch that a pair is to be measured against."""
    first = pair[0]
    wanted = settings(first.config, branch)
    own = [side for side in solos if side[0].branches == [branch]]
    candidates = [(differences(wanted, settings(side[0].config)), side) for side in own]
    if not candidates:
        raise UserError(
            f"compare: no run of {branch} alone among those given; "
            f"train it with: mokd train {first.path / 'config.yaml'} --solo {branch}"
        )

    def serious_of(keys: Iterable[str]) -> list[str]:
        distilled = isinstance(first.config.objective, DistillationConfig)
        return [k for k in keys if not k.startswith(_TERMS) and not (distilled and _DISTILLED.match(k))]

    # terms of the objective may differ, where nothing else does
    found, side = min(candidates, key=lambda it: (serious_of(it[0]) != [], "objective.kind" in it[0], len(it[0])))
    solo = side[0]
    if serious := serious_of(found):
        key, rest = serious[0], len(serious) - 1
        there, here = settings(solo.config).get(key), wanted.get(key)
        more = f" (and {rest} more keys)" if rest else ""
        problem = f"{solo.path} is no baseline of {first.path}: {key} is {there!r} there, {here!r} here{more}"
        object_to(problem, force, remarks)
    elif found:
        # of another kind of objective the kind says all
        told = [k for k in found if "objective.kind" not in found or k == "objective.kind" or "objective." not in k]
        remarks.append(f"{solo.path}, baseline of {first.path}, has other terms of its own: {', '.join(told)}")
    seeds = [sorted(run.config.seed for run in runs) for runs in (pair, side)]
    if seeds[0] != seeds[1]:
        object_to(f"seeds of {first.path} are {seeds[0]}, of its baseline {solo.path} {seeds[1]}", force, remarks)
    return side


def object_to(problem: str, force: bool, remarks: list[str], advice: str = "") -> None:
    """UserError for what makes a comparison unfair, with advice; where it is forced, a remark."""
    if not force:
        raise UserError(f"compare: {problem}; {advice}--force compares them all the same")
    remarks.append(problem)


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    """The objective's kind; of several of a kind, all but the first also say in what they differ from that one."""
    first: dict[str, RunConfig] = {}
    labels = []
    for config in configs:
        kind = config.objective.kind
        reference = first.setdefault(kind, config)
        own = settings(config)
        changed = [f"{k.removeprefix('objective.')}={own.get(k)}" for k in differences(settings(reference), own)]
        labels.append(" ".join([kind, *changed]))
    return labels
