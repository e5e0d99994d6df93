"""`mokd report`, `mokd runs` and `mokd views`: runs and their views as pages and pictures."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from launcher.cli.console import AsJson, find_config, print_json, print_table
from launcher.cli.jobs import find_run, open_run
from launcher.report.build import build_report
from launcher.report.summary import COLUMNS, SORT_KEYS, index_page, list_runs
from mokd.config import load_config
from mokd.runs.files import replace_bytes
from mokd.runs.run_directory import RunDirectory


def register(app: typer.Typer) -> None:
    """Adds the three commands."""
    app.command(epilog="Example: mokd report runs/demo")(report)
    app.command(epilog="Example: mokd runs --state done --sort knn --html runs/index.html")(runs)
    app.command(epilog="Example: mokd views vit_s_resnet50.yaml --images 4 --out views.png")(views)


def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or their names in runs/")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="default: report.html in the first run")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run, or several side by side, as one HTML file that needs no network: to be shown or sent."""
    directories = [open_run(run) for run in runs]
    target = out or directories[0].path / "report.html"
    _write(target, build_report(directories).encode())
    if as_json:
        print_json({"report": str(target), "runs": [str(run.path) for run in directories]})
    else:
        print(target)


def runs(
    root: Annotated[Path, typer.Argument(help="folder of the run directories")] = Path("runs"),
    state: Annotated[str | None, typer.Option(help="only runs in this state: done, running, failed, ...")] = None,
    sort: Annotated[str, typer.Option(help=f"by what: {', '.join(SORT_KEYS)}")] = "activity",
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="write the table as a page")] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, step, best k-NN accuracy of every branch, goodput."""
    if sort not in SORT_KEYS:
        raise UserError(f"--sort {sort}: expected one of {', '.join(SORT_KEYS)}")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the run directories")
    lines = list_runs(root, state, sort)
    if html:
        _write(html, index_page(lines, root, html.absolute().parent).encode())
    if as_json:
        print_json({"runs": [asdict(line) for line in lines]})
    elif html:
        print(html)
    else:
        print_table(f"runs in {root}", COLUMNS, [line.cells() for line in lines])


def views(
    source: Annotated[str, typer.Argument(metavar="CONFIG|RUN", help="a configuration, or a run directory")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="key.path=value")] = None,
    images: Annotated[int, typer.Option(min=1, max=64, help="how many images, spread over the data set")] = 4,
    epoch: Annotated[int, typer.Option(min=0, help="views differ from epoch to epoch")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="default: RUN/analysis/views.png, or views.png")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw some images with all their views as the networks will get them, and print the draws; trains nothing."""
    run = find_run(Path(source))
    is_run = (run / "config.yaml").is_file()
    file = RunDirectory(run).config_file if is_run else find_config(source)
    config = load_config(file, overrides or [])
    target = out or (run / "analysis" / "views.png" if is_run else Path("views.png"))

    import numpy as np

    from data_pipeline.beton.samples import open_samples
    from data_pipeline.loaders.build import check_path
    from data_pipeline.loaders.picture import view_picture
    from data_pipeline.sampling.order import subset

    check_path(config.data.train, config.data.backend)
    samples = open_samples(config.data.train, config.data.channels)
    kept = subset(samples.size, config.data.limit)
    chosen = kept[np.linspace(0, len(kept) - 1, min(images, len(kept))).astype(int)].tolist()
    picture, facts = view_picture(samples, config.views, config.seed, epoch, chosen)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    _write(target, stream.getvalue())
    if as_json:
        print_json({"picture": str(target), "epoch": epoch, "samples": facts})
        return
    for sample in facts:
        print(f"sample {sample['sample']}, {sample['width']} x {sample['height']} pixels")
        for view in sample["views"]:
            x, y, width, height = view["box"]
            jitter = ", ".join(f"{name} {factor:g}" for name, factor in view["jitter"].items())
            changes = [name for name in ("flip", "grey", "solarize") if view[name]]
            changes += [f"blur {view['blur_radius_px']:g} px"] if view["blur_radius_px"] else []
            told = "; ".join(part for part in (", ".join(changes), jitter) if part)
            print(f"  view {view['view']}: {width} x {height} at ({x}, {y}); {told or 'unchanged'}")
    print(target)


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
