"""What branches have gained by learning together, from the recorded evaluations of the runs compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.core.errors import UserError
from mokd.comparison.bootstrap import RESAMPLES, Gain, bootstrap_gain
from mokd.comparison.pairing import Method, Run, group
from mokd.evaluation.results import SETTINGS, Evaluation, read, result_path
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory

# (step, k-NN top-1 in percent) while training
Curve = list[tuple[int, float]]
_TITLES = {"knn": "k-NN", "linear": "linear probe", "semi": "few labels"}


@dataclass(frozen=True)
class BranchGain:
    """One branch: its gain, what every run contributed, and the curves of both sides by seed: with curve_k neighbours,
    as the gain, where all runs have recorded that, else (None) with the best k of each step.
    """

    gain: Gain
    runs: list[dict[str, Any]]
    pair_curves: dict[int, Curve]
    solo_curves: dict[int, Curve]
    curve_k: int | None = None


@dataclass(frozen=True)
class MethodGain:
    """All branches of one pair configuration."""

    label: str
    branches: dict[str, BranchGain]


@dataclass(frozen=True)
class Comparison:
    """Pairs against solo baselines on one task: top-1 accuracy in percent. images: how many test images.

    at: the setting of the task (k, lr, fraction) that was asked for; None for that of its headline.
    """

    task: str
    network: str
    at: float | None
    test: str
    images: int
    resamples: int
    methods: list[MethodGain]
    remarks: list[str]

    @property
    def title(self) -> str:
        """The task for human eyes, with the setting that was asked for."""
        name = _TITLES.get(self.task, self.task)
        # a result that was given a name of its own is asked for by that name
        return name if self.at is None else f"{name} ({SETTINGS.get(self.task, 'at')} {self.at:g})"

    @property
    def title_with_setting(self) -> str:
        """The same with the setting of the headline, where it is one for all runs."""
        key = SETTINGS.get(self.task, "")
        runs = [run for method in self.methods for branch in method.branches.values() for run in branch.runs]
        found = {run.get(key) for run in runs}
        one = found.pop() if self.at is None and len(found) == 1 else None
        return self.title if one is None else f"{self.title} ({key} {one:g})"

    def document(self) -> dict[str, Any]:
        """As a JSON object; `branches` is the first method's part of `methods`."""
        methods = [{"label": m.label, "branches": _branches(m.branches)} for m in self.methods]
        about = {key: getattr(self, key) for key in ("task", "network", "at", "test", "images", "resamples", "remarks")}
        return {**about, "branches": methods[0]["branches"], "methods": methods}


def compare(
    runs: Sequence[Run],
    *,
    task: str,
    network: str,
    at: float | None = None,
    force: bool = False,
    resamples: int = RESAMPLES,
) -> Comparison:
    """The gain of every branch of every pair among `runs`, under the setting `at` of the task or that of its headline.

    UserError in one line for runs that do not belong together or have not been evaluated.
    """
    methods, remarks = group(runs, force=force)
    evaluations: dict[Path, Evaluation] = {}
    for method in methods:
        own: dict[Path, Evaluation] = {}
        for side in (method.pair, *method.solo.values()):
            own |= {run.path: newest_evaluation(run.path, task, network) for run in side.values()}
        _check_steps(own, force, remarks)
        evaluations |= own
    _check_questions(evaluations)
    _check_protocols(evaluations, force, remarks)
    gains = [
        MethodGain(method.label, {b: _gain(method, b, evaluations, at, resamples) for b in method.solo})
        for method in methods
    ]
    test = next(iter(evaluations.values()))
    return Comparison(task, network, at, test.test, test.images, resamples, gains, remarks)


def newest_evaluation(run: Path, task: str, network: str) -> Evaluation:
    """What `mokd eval` has recorded of a run's newest evaluated step; UserError with the command when nothing."""
    folder = RunDirectory(run).evaluations
    stem, suffix = result_path(Path(), task, network, 0).stem.removesuffix("0"), ".json"
    steps = [path.stem.removeprefix(stem) for path in folder.glob(f"{stem}*{suffix}")]
    numbers = [int(step) for step in steps if step.isdigit()]
    if not numbers:
        option = "" if network == "teacher" else f" --network {network}"
        raise UserError(f"{run}: no {task} of the {network} on record; run: mokd eval {run} --task {task}{option}")
    return read(result_path(folder, task, network, max(numbers)))


def knn_curve(run: Path, branch: str, k: int | None = None) -> Curve:
    """A branch's k-NN top-1 while training, by step, with k neighbours or the best of all that are tried; empty where
    it is not on record.
    """
    key = f"eval/{branch}/knn_top1" if k is None else f"eval/{branch}/knn_top1_k{k}"
    return [(r["step"], r[key]) for r in read_metrics(RunDirectory(run).metrics_file) if r.get(key) is not None]


def _check_questions(evaluations: Mapping[Path, Evaluation]) -> None:
    """All must have answered the same questions."""
    (first, reference), *others = evaluations.items()
    for path, found in others:
        if not np.array_equal(found.labels, reference.labels):
            raise UserError(
                f"compare: {path} was tested on {found.test} ({found.images} images), {first} on "
                f"{reference.test} ({reference.images} images); evaluate all on the same"
            )


def _check_protocols(evaluations: Mapping[Path, Evaluation], force: bool, remarks: list[str]) -> None:
    """All must have been evaluated alike, unless forced; of old evaluations it is not known."""
    known = [(path, protocol) for path, found in evaluations.items() for protocol in set(found.protocols.values())]
    for path, protocol in known:
        if protocol == known[0][1]:
            continue
        problem = f"{path} was evaluated with other settings or training data than {known[0][0]}"
        if not force:
            raise UserError(f"compare: {problem}; evaluate both alike; --force compares them all the same")
        remarks.append(problem)


def _check_steps(evaluations: Mapping[Path, Evaluation], force: bool, remarks: list[str]) -> None:
    """A pair and its baselines must have trained equally long, unless forced; two methods need not."""
    (first, reference), *others = evaluations.items()
    for path, found in others:
        if found.step == reference.step:
            continue
        problem = f"{path} was evaluated at step {found.step}, {first} at step {reference.step}"
        if not force:
            raise UserError(f"compare: {problem}; train on, or evaluate again; --force compares them all the same")
        remarks.append(problem)


def _gain(
    method: Method, branch: str, evaluations: Mapping[Path, Evaluation], at: float | None, resamples: int
) -> BranchGain:
    sides = {"pair": method.pair, "solo": method.solo[branch]}
    found = {
        run.path: _record(evaluations[run.path], branch, at, run.path) for s in sides.values() for run in s.values()
    }
    fractions = {record["fraction"] for record in found.values() if "fraction" in record}
    if len(fractions) > 1:
        known = ", ".join(f"{fraction:g}" for fraction in sorted(fractions))
        raise UserError(
            f"compare: the largest fraction of {branch}'s labels is not the same for all: {known}; give --at"
        )
    right = {
        side: np.stack([_right(evaluations[run.path], found[run.path]) for run in runs.values()])
        for side, runs in sides.items()
    }
    gain = bootstrap_gain(right["pair"], right["solo"], same_seeds=method.same_seeds(branch), resamples=resamples)
    records = [
        {"side": side, "seed": seed, "run": str(run.path), **found[run.path]}
        for side, runs in sides.items()
        for seed, run in runs.items()
    ]
    ks = {record.get("k") for record in found.values()}
    k = ks.pop() if len(ks) == 1 else None
    curves = _curves(sides, branch, k)
    if not all(curve for side in curves.values() for curve in side.values()):  # older runs have the best k alone
        k, curves = None, _curves(sides, branch, None)
    return BranchGain(gain, records, curves["pair"], curves["solo"], k)


def _curves(sides: Mapping[str, Mapping[int, Run]], branch: str, k: int | None) -> dict[str, dict[int, Curve]]:
    return {side: {seed: knn_curve(run.path, branch, k) for seed, run in runs.items()} for side, runs in sides.items()}


def _right(evaluation: Evaluation, record: Mapping[str, Any]) -> np.ndarray:
    """Which images `[M]` are right by a record of an evaluation."""
    return evaluation.predictions[record["predictions"]] == evaluation.labels


def _record(evaluation: Evaluation, branch: str, at: float | None, path: Path) -> dict[str, Any]:
    record, task = evaluation.record(branch, at), evaluation.task
    if record is None and evaluation.record(branch) is None:
        raise UserError(f"{path}: {task} on record, but not of {branch}; run: mokd eval {path} --task {task}")
    if record is None:
        setting = SETTINGS[task]
        known = ", ".join(f"{r[setting]:g}" for r in evaluation.results if r["branch"] == branch)
        raise UserError(f"{path}: no {task} of {branch} with {setting} {at:g}; there are: {known}")
    return {key: value for key, value in record.items() if key != "headline"}


def _branches(branches: Mapping[str, BranchGain]) -> dict[str, Any]:
    return {
        name: {
            "solo": round(b.gain.solo, 3),
            "pair": round(b.gain.pair, 3),
            "gain": round(b.gain.gain, 3),
            "ci95": _rounded(b.gain.gain_ci95),
            "solo_ci95": _rounded(b.gain.solo_ci95),
            "pair_ci95": _rounded(b.gain.pair_ci95),
            "seeds": {side: sorted(r["seed"] for r in b.runs if r["side"] == side) for side in ("pair", "solo")},
            "runs": b.runs,
        }
        for name, b in branches.items()
    }


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 3) for value in interval]
