"""`mokd export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.console import AsJson, print_json
from launcher.cli.jobs import open_run


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: mokd export runs/demo --branch resnet --format timm")(export)


def export(
    run: Annotated[Path, typer.Argument(help="a run directory, or its name in runs/")],
    kind: Annotated[str, typer.Option("--format", help="timm, torchvision, safetensors, onnx or huggingface")],
    branch: Annotated[str | None, typer.Option(help="which network; default: every branch")] = None,
    network: Annotated[str, typer.Option(help="teacher or student")] = "teacher",
    out: Annotated[Path | None, typer.Option(help="folder; default: RUN/export/BRANCH-NETWORK-FORMAT")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False,
    as_json: AsJson = False,
) -> None:
    """Write networks of a run as files that load without this project; each is read back and compared.

    safetensors holds the heads too, the other formats the backbone. The folder's README.md has the lines that load it.
    """
    from mokd.export.export import export as write

    done = list(write(open_run(run), branch, kind, network, out, replace=force))
    if as_json:
        print_json({"exports": [asdict(item) for item in done]})
        return
    for item in done:
        print(f"{item.folder}: {item.network} of {item.branch} at step {item.step}, {item.format}")
        print(f"  read back in a clean process: features differ by {item.difference:.1e} of the largest one at most")
