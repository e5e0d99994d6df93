"""`mokd compare`: what every branch has gained by learning together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.core.errors import UserError
from launcher.cli.console import AsJson, print_json, print_table, say
from launcher.cli.jobs import find_run
from launcher.report.gains import COLUMNS, rows_of

if TYPE_CHECKING:
    from mokd.comparison.gain import Comparison


def register(app: typer.Typer) -> None:
    """Adds `mokd compare`."""
    app.command(epilog="Example: mokd compare runs/demo runs/demo-solo-resnet runs/demo-solo-vit --plot gain.png")(
        compare
    )


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="pair runs and the runs of their branches alone, in any order: paths, or names in runs/"),
    ],
    task: Annotated[str, typer.Option(help="which recorded evaluation: knn, linear, semi or transfer")] = "knn",
    network: Annotated[str, typer.Option(help="teacher or student")] = "teacher",
    at: Annotated[
        float | None,
        typer.Option(help="k of knn, rate of linear, fraction of the labels; default: the task's headline"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="compare runs that differ in more than their branches")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw accuracies and k-NN curves")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what every branch has gained over training alone, with 95% intervals.

    Runs that differ by their seed only belong together; the intervals then cover seeds as well as test images.
    """
    from mokd.comparison.gain import compare as compare_runs
    from mokd.comparison.pairing import Run

    if plot is not None and not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: no such folder")
    opened = [Run.open(find_run(run)) for run in runs]
    comparison = compare_runs(opened, task=task, network=network, at=at, force=force)
    for remark in comparison.remarks:
        say(f"warning: {remark}")
    if plot is not None:
        from mokd.comparison.plots import plot as draw

        draw(comparison, plot)
    if as_json:
        print_json(comparison.document())
    else:
        show(comparison)


def show(comparison: Comparison) -> None:
    """A table for every method, on stdout."""
    for what, rows in rows_of(comparison):
        print_table(f"{what}, {comparison.images:,} images", COLUMNS, rows)
