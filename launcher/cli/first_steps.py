"""`mokd demo` and `mokd init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from launcher.cli.console import find_config, messages
from launcher.cli.train import Overrides, show_progress
from mokd.config import load_config


def register(app: typer.Typer) -> None:
    """Adds the commands of the first minutes."""
    app.command(epilog="Example: mokd demo --data ~/photos")(demo)
    app.command(epilog="Example: mokd init --data data/train.beton --pair resnet50,vit_small")(init)


def demo(
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="your images; default: some are drawn")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks to start on this machine")] = 2,
    root: Annotated[Path, typer.Option(help="folder of the run directories")] = Path("runs"),
    data_only: Annotated[bool, typer.Option("--data-only", help="make images and betons, train nothing")] = False,
) -> None:
    """Train a small ResNet and a small vision transformer together, in minutes on two cores, and show how it went.

    Writes below data/ and runs/ of the working directory; called again, it goes on where it stopped.
    """
    from launcher.first_steps.demo import prepare
    from launcher.report.build import build_report
    from mokd.runs.exit_codes import EXIT_STOPPED
    from mokd.runs.files import replace_bytes
    from mokd.training.start import train

    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    settings = prepare(data, nproc, lambda text: messages.print(text, markup=False))
    if data_only:
        return
    config = load_config(find_config("demo.yaml"), [*settings, *(overrides or [])])
    run, status = train(config, root, resume=True, nproc=nproc)
    if status == 0:
        show_progress(run.path, config)
        report = run.path / "report.html"
        replace_bytes(report, build_report([run]).encode())
        print(f"report       {report}\nnext         mokd init, for a configuration of your own")
    elif status == EXIT_STOPPED:
        messages.print("stopped at a step boundary; the same command continues there")
    raise typer.Exit(status)


def init(
    file: Annotated[Path, typer.Argument(help="the configuration to write")] = Path("mokd.yaml"),
    data: Annotated[Path | None, typer.Option(help="training images: a beton, or a folder")] = None,
    test: Annotated[Path | None, typer.Option(help="test images; default: val or test beside them")] = None,
    pair: Annotated[str | None, typer.Option(help="two networks, for example resnet50,vit_small")] = None,
    name: Annotated[str | None, typer.Option(help="of the run; default: the file's")] = None,
    channels: Annotated[int | None, typer.Option(help="of a folder's images; default: 3, or the beton's")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
) -> None:
    """Write a first configuration, with comments, for your images and this machine; asks for what is not given."""
    from launcher.first_steps import init as first
    from mokd.runs.files import replace_text

    if file.exists() and not overwrite:
        raise UserError(f"{file}: exists already; give another name, or --overwrite")
    asks = sys.stdin.isatty()
    if data is None and not asks:
        raise UserError("--data is missing: where are the training images?")
    data = data or Path(typer.prompt("Training images (a beton, or a folder)"))
    found, machine = first.look(data, channels), first.Machine.here()
    proposed = first.fitting_pair(found, machine)
    if pair is None and asks:
        for known, (_, when) in first.PAIRS.items():
            messages.print(f"  {known:20} {when}")
        pair = typer.prompt("Pair", default=proposed)
    configs = find_config("demo.yaml").parent
    chosen, called = pair or proposed, name or file.stem
    text = first.configuration(called, chosen, data, test or first.test_images(data), found, machine, configs, file)
    replace_text(file, text)
    print(f"{file}: {chosen} on {found.size} images of about {found.side_px} pixels")
    more = f" --channels {channels}" if channels and data.is_dir() else ""
    if found.mean:
        print(f"             views.mean and views.std: of some images; of all: mokd convert --statistics {data}{more}")
    if data.is_dir():
        out = f"{data.name}.beton"
        print(f"faster       mokd convert {data} {out}{more}, then mokd init --data {out} --overwrite")
    print(f"next         mokd views {file}\n             mokd train {file} --nproc {max(1, machine.gpus)}")
