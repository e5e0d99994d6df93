"""MOKD against its solo baselines: trains, evaluates and compares pairs and every branch alone, for several seeds.

`mokd bench gain` runs it. Everything is kept in ordinary run directories: interrupted and called again, it goes on
where it was, and finished runs of the same configuration are taken as they are, whatever they are called.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from data_pipeline.core.errors import DataError, UserError
from mokd.comparison.gain import Comparison, compare
from mokd.comparison.pairing import Run, differences, settings
from mokd.comparison.solo import solo
from mokd.config import DistillationConfig, RunConfig, with_absolute_paths
from mokd.evaluation.entry import evaluate
from mokd.evaluation.request import TASKS, Request
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.runs.files import read_json
from mokd.runs.metrics import read_metrics, useful_seconds
from mokd.runs.run_directory import RunDirectory
from mokd.training.start import train

Say = Callable[[str], None]

NETWORK = "teacher"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "ffcv")
SOURCES = ("mokd", "data_pipeline", "benchmarks", "configs")


class Stopped(Exception):
    """Training was asked to stop; its state is saved."""


@dataclass(frozen=True)
class Result:
    """comparisons: by task, for few labels by `semi-<fraction>`. document: what is recorded."""

    comparisons: dict[str, Comparison]
    document: dict[str, Any]


def run(
    configs: Sequence[RunConfig], seeds: Sequence[int], tasks: Sequence[str], root: Path, nproc: int, say: Say
) -> Result:
    """Pairs of `configs` against every branch of them alone, with equal epochs and everything else.

    A configuration that distils a frozen branch which another one trains alone comes after that one.

    Stopped when asked to stop while training. UserError for a configuration of one branch, and for a run of that name
    with other settings; DataError when a run fails.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--task {task}: expected {' or '.join(TASKS)}")
    wanted = plan(configs, seeds)
    places = [locate(config, root) for config in wanted]  # conflicts are told before hours are spent
    for number, (config, place) in enumerate(zip(wanted, places, strict=True), start=1):
        said = f"run {number} of {len(wanted)}, {place.path}"
        if _is_done(place):
            say(f"{said}: trained already")
        else:
            say(f"{said}: {'continuing' if place.config_file.is_file() else 'training'}")
            _train(config, root, nproc)
    for task in tasks:
        for config, place in zip(wanted, places, strict=True):
            say(f"{task} of {place.path}")
            _evaluate(config, place, task, nproc)
    runs = [Run(place.path, config) for config, place in zip(wanted, places, strict=True)]
    comparisons = {
        task if at is None else f"{task}-{at:g}": compare(runs, task=task, network=NETWORK, at=at)
        for task in tasks
        for at in (configs[0].evaluation.semi.fractions if task == "semi" else (None,))
    }
    return Result(comparisons, _document(configs, seeds, comparisons, runs))


def plan(configs: Sequence[RunConfig], seeds: Sequence[int]) -> list[RunConfig]:
    """The configurations of all runs: for every seed the pair, then each of its branches that learns alone.

    What distils frozen branches has no baseline of its own kind: that of another configuration serves it.
    """
    planned = []
    if all(isinstance(config.objective, DistillationConfig) for config in configs):
        name, kind = configs[0].name, configs[0].objective.kind
        raise UserError(f"{name}: objective {kind} has no baseline of its own; give a pair of these networks before it")
    for config in configs:
        if len(config.branches) < 2:
            raise UserError(f"{config.name}: has one branch; the gain is that of branches trained together")
        if not (config.evaluation.train and config.evaluation.test):
            raise UserError(f"{config.name}: needs both evaluation.train and evaluation.test")
        for seed in seeds:
            together = config.model_copy(update={"seed": seed, "name": f"{config.name}-seed-{seed}"})
            planned.append(together)
            if not isinstance(config.objective, DistillationConfig):
                planned += [solo(together, branch.name) for branch in config.branches if not branch.frozen]
    return planned


def locate(config: RunConfig, root: Path) -> RunDirectory:
    """The run of that name, to be continued or new; or a finished one of another name and the same settings."""
    own = RunDirectory(root / config.name)
    if own.config_file.is_file():
        if different := _training_differences(config, own.config()):
            raise UserError(
                f"{own.path}: exists with another configuration, {different[0]} differs; "
                "choose another --root, or another name with --set name=..."
            )
        return own
    for path in sorted(root.glob("*/config.yaml")):
        other = RunDirectory(path.parent)
        if _is_done(other) and _same(config, other):
            return other
    return own


def _same(config: RunConfig, other: RunDirectory) -> bool:
    try:
        return not _training_differences(config, other.config())
    except UserError:  # of another version, say
        return False


def _training_differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Where runs differ in what they learn. How they are measured is this benchmark's own affair."""
    a, b = with_absolute_paths(a), with_absolute_paths(b)  # as runs have them
    keys = differences({**settings(a), "seed": a.seed}, {**settings(b), "seed": b.seed})
    return [key for key in keys if not key.startswith("evaluation.")]


def _is_done(run: RunDirectory) -> bool:
    return run.read_status().get("state") == "done"


def _train(config: RunConfig, root: Path, nproc: int) -> None:
    directory, status = train(config, root, resume=True, nproc=nproc)
    if status == EXIT_STOPPED:
        raise Stopped
    if status != EXIT_DONE:
        raise DataError(f"{directory.path}: failed: {directory.read_status().get('reason', f'exit status {status}')}")


def _evaluate(config: RunConfig, place: RunDirectory, task: str, nproc: int) -> None:
    """All runs by the same protocol, whatever their own configuration says; what is on record is not done again."""
    protocol = json.dumps(config.evaluation.model_dump(mode="json"))
    request = Request(source=place.path, task=task, network=NETWORK, overrides=(f"evaluation={protocol}",))
    evaluation, status = evaluate(request, nproc)
    if evaluation is None:
        raise DataError(f"{place.path}: {task} failed, exit status {status}")


def _document(
    configs: Sequence[RunConfig], seeds: Sequence[int], comparisons: dict[str, Comparison], runs: Sequence[Run]
) -> dict[str, Any]:
    first = next(iter(comparisons.values()))
    return {
        "configs": [config.name for config in configs],
        "seeds": list(seeds),
        "tasks": {task: comparison.document() for task, comparison in comparisons.items()},
        "curves": {
            method.label: {
                name: {"pair": branch.pair_curves, "solo": branch.solo_curves}
                for name, branch in method.branches.items()
            }
            for method in first.methods
        },
        "runs": [_about(run) for run in runs],
        "settings": {config.name: config.model_dump(mode="json", exclude={"cluster"}) for config in configs},
        "machine": {**describe(PACKAGES, SOURCES), "command": ["mokd", *sys.argv[1:]]},
    }


def _about(run: Run) -> dict[str, Any]:
    """What a run was: its length and speed, and the code and versions it was trained with.

    training_seconds: of its steps alone, by the clock; what ran beside it counts.
    """
    directory = RunDirectory(run.path)
    status, environment = directory.read_status(), read_json(directory.environment_file) or {}
    records = read_metrics(directory.metrics_file)
    speeds = [record["images_per_second"] for record in records if record.get("images_per_second")]
    return {
        "run": str(run.path),
        "branches": run.branches,
        "seed": run.config.seed,
        "epochs": run.config.optim.epochs,
        "steps": status.get("step"),
        "images_per_second": round(statistics.median(speeds), 2) if speeds else None,
        "training_seconds": round(useful_seconds(records), 2),
        "commit": environment.get("commit"),
        "packages": environment.get("packages"),
    }
