"""`mokd convert` and `mokd verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.console import AsJson, print_json, say
from mokd.runs.progress import WorkProgress, duration


def register(app: typer.Typer) -> None:
    """Adds the data commands."""
    app.command(epilog="Example: mokd convert imagenet/train train.beton --max-resolution 400")(convert)
    app.command(epilog="Example: mokd verify train.beton")(verify)


def convert(
    sources: Annotated[
        list[Path], typer.Argument(help="folders, .tar, .parquet, .arrow, lists (.csv, .tsv, .txt); then the output")
    ],
    mode: Annotated[str, typer.Option(help="original: keep JPEG bytes; jpg: re-encode; raw: pixels")] = "original",
    max_resolution: Annotated[int | None, typer.Option(help="longest side in pixels; larger images are shrunk")] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality where re-encoding is needed")] = 90,
    channels: Annotated[int, typer.Option(help="3: RGB; 1: grey; another number: that of the images, stored raw")] = 3,
    bits: Annotated[int | None, typer.Option(help="bits that 16-bit pixels use, where the files do not say")] = None,
    image_column: Annotated[str | None, typer.Option(help="of tables, where it is in doubt")] = None,
    label_column: Annotated[str | None, typer.Option(help="of tables, where it is in doubt")] = None,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="write nothing: mean and deviation of the sources, for views")
    ] = False,
    subset: Annotated[float | None, typer.Option(help="keep this part of every class, for example 0.01")] = None,
    seed: Annotated[int, typer.Option(help="chooses the subset")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="an image that cannot be used is an error")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing beton")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue where the same conversion was killed")] = False,
    workers: Annotated[int | None, typer.Option(help="default: the cores of this process")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert images to one beton: SOURCE [SOURCE ...] OUTPUT."""
    from data_pipeline.beton.convert import ConvertOptions
    from data_pipeline.beton.convert import convert as run
    from data_pipeline.core.errors import UserError

    if len(sources) < 2 and not statistics:
        raise UserError("convert: give an image folder and the output, for example: mokd convert train/ train.beton")
    options = ConvertOptions(
        mode=mode,  # type: ignore[arg-type]
        max_resolution=max_resolution,
        quality=quality,
        channels=channels,
        bits=bits,
        image_column=image_column,
        label_column=label_column,
        subset=subset,
        seed=seed,
        strict=strict,
        overwrite=overwrite,
        resume=resume,
        workers=workers,
    )
    if statistics:
        _show_statistics(sources, options, as_json)
        return
    with WorkProgress("convert") as progress:
        report = run(sources[:-1], sources[-1], options, progress.update, _announce)
    if as_json:
        print_json(asdict(report))
        return
    for skipped in report.skipped:
        say(f"skipped {skipped.path}: {skipped.reason}")
    for line in about_classes(report.classes, report.unlabelled):
        say(line)
    rate = report.written / max(report.seconds, 1e-9)
    print(
        f"{report.output}: {report.written} images, {len(report.skipped)} skipped, {report.bytes / 1e6:.1f} MB, "
        f"{report.seconds:.1f} s ({rate:.0f} images/s)"
    )


def _show_statistics(sources: Sequence[Path], options: Any, as_json: bool) -> None:
    from data_pipeline.beton.statistics import statistics

    with WorkProgress("statistics") as progress:
        found = statistics(sources, options, progress.update)
    if as_json:
        print_json(asdict(found))
        return
    for skipped in found.skipped:
        say(f"skipped {skipped.path}: {skipped.reason}")
    print(f"views.mean=[{', '.join(f'{value:.4f}' for value in found.mean)}]")
    print(f"views.std=[{', '.join(f'{value:.4f}' for value in found.std)}]")
    say(f"of {found.images} images, {len(found.skipped)} skipped")


def about_classes(classes: Sequence[str], unlabelled: int) -> list[str]:
    """What a person should know of the classes that were found."""
    from data_pipeline.beton.sources import SPLITS

    if not classes:
        return ["no classes: the images lie in no sub-folders, and have no labels"]
    shown = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
    lines = [f"{len(classes)} class{'es' * (len(classes) > 1)}: {shown}"]
    if set(classes) <= SPLITS:
        lines.append("warning: these look like parts of a data set, not classes; convert each of the folders by itself")
    if unlabelled:
        lines.append(f"warning: {unlabelled} images lie beside the class folders and have no label")
    return lines


def _announce(forecast: Any) -> None:
    size, free = (
        f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
        for size in (forecast.bytes, forecast.free_bytes)
    )
    say(
        f"convert: {forecast.images} images, about {size} and {duration(forecast.seconds)} with {forecast.workers} "
        f"workers; the disk has {free} left"
    )


def verify(
    beton: Annotated[Path, typer.Argument(help="the beton to check")],
    as_json: AsJson = False,
) -> None:
    """Read every sample of a beton and compare it with its checksum."""
    from data_pipeline.beton.verify import verify as run

    with WorkProgress("verify") as progress:
        report = run(beton, progress.update)
    if as_json:
        print_json(asdict(report))
    else:
        for bad in report.bad:
            print(f"sample {bad.sample_id} ({bad.path}): {bad.reason}")
        print(f"{beton}: {report.problem or f'{report.samples} samples, {len(report.bad)} damaged'}")
    if not report.ok:
        raise typer.Exit(1)
