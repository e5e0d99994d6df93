"""`mokd eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.console import AsJson, print_json, print_table, say

# what a record says beside these is a setting of its task
_COMMON = ("branch", "network", "task", "step", "top1", "top5", "predictions", "headline")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(name="eval", epilog="Example: mokd eval runs/demo --task linear --json")(evaluate)


def evaluate(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or a file of weights")],
    task: Annotated[str, typer.Option(help="knn, linear, semi or transfer")] = "knn",
    network: Annotated[str, typer.Option(help="teacher, student, or scratch: as before any training")] = "teacher",
    branch: Annotated[list[str] | None, typer.Option(help="only this branch; may be repeated")] = None,
    train: Annotated[Path | None, typer.Option(help="labelled beton or folder; default: the configuration's")] = None,
    test: Annotated[Path | None, typer.Option(help="labelled beton or folder; default: the configuration's")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks to start on this machine")] = 1,
    name: Annotated[str | None, typer.Option(help="name of the result; default: the task's")] = None,
    again: Annotated[bool, typer.Option("--again", help="compute even what is known")] = False,
    backbone: Annotated[str | None, typer.Option(help="timm name of the network that a file is of")] = None,
    stem: Annotated[str, typer.Option(help="default, cifar or cifar_stride2, for a file")] = "default",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate every branch of a run at its newest checkpoint, or the weights in a file.

    Results are kept in RUN/eval/ (FILE.eval/) and computed again only when something that they follow from has changed.
    A call that was cut off continues.
    """
    from mokd.evaluation.request import Request

    request = Request(
        source=source,
        task=task,
        network=network,
        branches=tuple(branch or ()),
        train=train,
        test=test,
        overrides=tuple(overrides or ()),
        name=name,
        again=again,
        backbone=backbone,
        stem=stem,
    )
    request.check()  # at once: torch is imported only now
    from mokd.evaluation.entry import evaluate as start

    evaluation, status = start(request, nproc)
    if evaluation is None:
        raise typer.Exit(status)
    if as_json:
        print_json(evaluation.document())
        return
    records = evaluation.results
    settings = list(dict.fromkeys(key for record in records for key in record if key not in _COMMON))
    columns = ["branch", *settings, "top1", "top5", "headline"]
    rows = []
    for record in records:
        about = [str(record.get(key, "")) for key in settings]
        numbers = [f"{record[key]:.2f}" for key in ("top1", "top5")]
        rows.append([record["branch"], *about, *numbers, "*" if record["headline"] else ""])
    title = f"{task} of {evaluation.network} at step {evaluation.step}, {evaluation.images} images, accuracy in %"
    print_table(title, columns, rows)
    for line in open_ended(records):
        say(line)


def open_ended(records: list[dict[str, Any]]) -> list[str]:
    """A line per branch whose best learning rate is the first or last that was tried: the optimum may lie beyond."""
    lines = []
    probes = [record for record in records if record["task"] == "linear"]
    for best in (record for record in probes if record["headline"]):
        rates = [record["lr"] for record in probes if record["branch"] == best["branch"]]
        if len(rates) > 1 and best["lr"] in (min(rates), max(rates)):
            which = "smallest" if best["lr"] == min(rates) else "largest"
            lines.append(
                f"{best['branch']}: the best rate, {best['lr']:g}, is the {which} tried; "
                "a wider grid may do better: --set evaluation.linear.rates=[...]"
            )
    return lines
