"""`mokd analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.console import AsJson, print_json, say
from launcher.cli.jobs import find_run


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: mokd analyze runs/demo --solo runs/demo-solo-vit --what distance,search")(analyze)


def analyze(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or a file of weights")],
    what: Annotated[
        str | None,
        typer.Option(help="parts, with commas: distance,cka,rank,agreement,tsne,attention,search,pca,neighbors"),
    ] = None,
    solo: Annotated[list[Path] | None, typer.Option(help="the run of a branch alone; may be repeated")] = None,
    branch: Annotated[list[str] | None, typer.Option(help="only this branch; may be repeated")] = None,
    network: Annotated[str, typer.Option(help="teacher, student, or scratch: as before any training")] = "teacher",
    step: Annotated[int | None, typer.Option(help="of the checkpoint; default: the newest")] = None,
    images: Annotated[int, typer.Option(min=1, max=64, help="test images in pictures")] = 6,
    samples: Annotated[int, typer.Option(min=8, help="test images for statistics")] = 512,
    name: Annotated[str | None, typer.Option(help="of the folder; default: network and step")] = None,
    train: Annotated[Path | None, typer.Option(help="labelled beton or folder; default: the configuration's")] = None,
    test: Annotated[Path | None, typer.Option(help="labelled beton or folder; default: the configuration's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    backbone: Annotated[str | None, typer.Option(help="timm name of the network that a file is of")] = None,
    stem: Annotated[str, typer.Option(help="default, cifar or cifar_stride2, for a file")] = "default",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw what the networks of a run have learned, one against the other and against their solo baselines.

    Each part leaves a PNG, an SVG and its numbers as JSON in RUN/analysis/NAME/ (FILE.analysis/NAME/).
    """
    from mokd.analysis.job import AnalysisRequest
    from mokd.analysis.job import analyze as start
    from mokd.evaluation.request import Request

    request = AnalysisRequest(
        evaluation=Request(
            source=source if source.is_file() else find_run(source),
            network=network,
            branches=tuple(branch or ()),
            train=train,
            test=test,
            overrides=tuple(overrides or ()),
            backbone=backbone,
            stem=stem,
        ),
        what=tuple(part for part in (what or "").split(",") if part),
        step=step,
        solos=tuple(find_run(run) for run in solo or ()),
        images=images,
        samples=samples,
        name=name,
        device=device,
    )
    findings, left_out = [], {}
    for written in start(request):
        if written.left_out is not None:
            left_out[written.part] = written.left_out
            say(f"{written.part}: left out, it {written.left_out}")
            continue
        findings.append({"part": written.part, "alt": written.alt, "files": [str(path) for path in written.files]})
        if not as_json:
            print(written.alt)
            print(f"  {written.files[0].with_suffix('')}.{{png,svg,json}}")
    if as_json:
        print_json({"findings": findings, "left_out": left_out})
