"""What pairs have gained over their branches alone, where those were trained beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.core.errors import UserError
from launcher.report.html import table

if TYPE_CHECKING:
    from mokd.comparison.gain import Comparison
    from mokd.comparison.pairing import Run

TASKS = ("knn", "linear")
COLUMNS = ["branch", "solo", "pair", "gain", "95% interval", "seeds"]


def gains(given: Sequence[Run], known: Sequence[Run]) -> str:
    """A table for every pair configuration among `given` runs and every task on record; empty without pairs or without
    their baselines among `known` ones.
    """
    from mokd.comparison.gain import compare
    from mokd.comparison.pairing import baselines

    chosen: dict[Path, Run] = {}
    for pair in given:
        if alone := baselines(pair, known):
            chosen |= {run.path.resolve(): run for run in (pair, *alone)}
    if not chosen:
        return ""
    parts = []
    for task in TASKS:
        try:
            comparison = compare(list(chosen.values()), task=task, network="teacher")
            for what, rows in rows_of(comparison):
                parts.append(table(f"{what}, {comparison.images:,} test images", COLUMNS, rows))
        except UserError as error:  # not evaluated, or not alike
            parts.append(f'<p class="quiet">{escape(str(error))}</p>')
    return f"<h2>Gain over training alone</h2>{''.join(parts)}"


def knn_gain(pair: Run, known: Sequence[Run]) -> dict[str, float]:
    """By branch, in points of k-NN top-1, from the evaluations on record; empty where one is missing."""
    from mokd.comparison.gain import newest_evaluation
    from mokd.comparison.pairing import baselines

    found = {}
    try:
        together = newest_evaluation(pair.path, "knn", "teacher")
        for solo in baselines(pair, known):
            (branch,) = solo.branches
            here, there = (e.record(branch) for e in (together, newest_evaluation(solo.path, "knn", "teacher")))
            if here and there:
                found[branch] = here["top1"] - there["top1"]
    except UserError:
        return {}
    return found


def opened(paths: Iterable[Path]) -> list[Run]:
    """The runs whose configuration can be read."""
    from mokd.comparison.pairing import Run

    found = []
    for path in paths:
        with suppress(UserError):
            found.append(Run.open(path))
    return found


def rows_of(comparison: Comparison) -> Iterator[tuple[str, list[list[str]]]]:
    """For every method what is compared, in words, and the cells of its branches, as COLUMNS."""
    for method in comparison.methods:
        rows = []
        for name, branch in method.branches.items():
            gain, (low, high) = branch.gain, branch.gain.gain_ci95
            numbers = [f"{gain.solo:.2f}", f"{gain.pair:.2f}", f"{gain.gain:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            rows.append([name, *numbers, str(len(branch.pair_curves))])
        yield f"{method.label}: {comparison.title}, top-1 of the {comparison.network} in %", rows
