"""What the table of runs and the head of a report say of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.report.gains import knn_gain, opened
from launcher.report.html import page, table
from launcher.runs.goodput import goodput
from launcher.runs.records import Records, checkpoint_step
from launcher.slurm.status import find_runs, read_status
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory

if TYPE_CHECKING:
    from mokd.comparison.pairing import Run


@dataclass(frozen=True)
class RunSummary:
    """One line of the table. Accuracies in percent, fractions of 1."""

    run: str
    state: str
    step: int
    total_steps: int | None
    restarts: int
    best_knn: dict[str, float]  # by branch
    gain: dict[str, float]  # by branch: k-NN top-1 of `mokd eval` in points over the branch alone, where that is known
    goodput: float | None  # useful over allocated time; None before the first attempt

    def cells(self) -> list[str]:
        """For people; as COLUMNS."""
        step = f"{self.step}/{self.total_steps}" if self.total_steps else str(self.step)
        knn = ", ".join(f"{branch} {value:.2f}" for branch, value in self.best_knn.items()) or "-"
        gain = ", ".join(f"{branch} {value:+.2f}" for branch, value in self.gain.items()) or "-"
        share = "-" if self.goodput is None else f"{100 * self.goodput:.0f}%"
        return [Path(self.run).name, self.state, step, knn, gain, share, str(self.restarts)]


COLUMNS = ["run", "state", "step", "best k-NN %", "gain", "goodput", "restarts"]
SORT_KEYS: dict[str, Callable[[RunSummary], Any]] = {
    "activity": lambda line: 0,  # as they are found
    "name": lambda line: line.run,
    "state": lambda line: (line.state, line.run),
    "step": lambda line: -line.step,
    "knn": lambda line: -max(line.best_knn.values(), default=-1.0),
    "goodput": lambda line: 1.0 if line.goodput is None else -line.goodput,
}


def summary(run: RunDirectory, known: Sequence[Run] = ()) -> RunSummary:
    """The facts of one run now; its baselines are looked for among `known` runs."""
    pair = next((one for one in known if one.path == run.path), None)
    account, mark, endings = goodput(run), run.read_status(), Records(run).endings()
    best: dict[str, float] = {}
    for record in read_metrics(run.metrics_file):
        for key, value in record.items():
            if value is not None and (match := re.fullmatch(r"eval/(.+)/knn_top1", key)):
                best[match[1]] = max(value, best.get(match[1], value))
    return RunSummary(
        run=str(run.path),
        state=read_status(run).state,
        step=max(int(mark.get("step", 0)), checkpoint_step(run)),
        total_steps=mark.get("total_steps"),
        restarts=sum(ending.verdict == "requeued" for ending in endings),
        best_knn=best,
        gain=knn_gain(pair, known) if pair else {},
        goodput=account.useful_fraction if account.attempts else None,
    )


def list_runs(root: Path, state: str | None = None, sort: str = "activity") -> list[RunSummary]:
    """The runs in a folder, those in one `state` if it is given; `knn` and `goodput` sort the best to the top."""
    runs = find_runs(root)
    known = opened(run.path for run in runs)
    found = [summary(run, known) for run in runs]
    return sorted((line for line in found if state in (None, line.state)), key=SORT_KEYS[sort])


def index_page(lines: list[RunSummary], root: Path, beside: Path) -> str:
    """The table as a page that will lie in the folder `beside`; runs that have a report are linked."""
    reports = [Path(line.run) / "report.html" for line in lines]
    links = [os.path.relpath(report, beside) if report.is_file() else "" for report in reports]
    body = f"<h1>Runs</h1><main>{table(f'Runs in {root}', COLUMNS, [line.cells() for line in lines], links)}"
    body += '<p class="quiet">A run has a link when it has a report: mokd report RUN.</p></main>'
    return page("Runs", body)
