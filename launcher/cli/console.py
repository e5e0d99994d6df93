"""What commands share: options, finding a configuration, JSON and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.core.errors import UserError

Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, for example optim.epochs=5")]
Root = Annotated[Path, typer.Option(help="folder of the run directories")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]

# everything that is not the answer itself goes to stderr
messages = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line on stderr, as it is."""
    messages.print(line, markup=False)


def find_config(name: str) -> Path:
    """A configuration by path, or by bare name in `configs/` of the working directory or of the installation."""
    given = Path(name)
    installed = Path(__file__).resolve().parents[1]  # a wheel carries them in the package, a checkout beside it
    homes = (Path("configs"), installed.parent / "configs", installed / "configs")
    for candidate in (given, *(home / given for home in homes), *(home / f"{name}.yaml" for home in homes)):
        if candidate.is_file():
            return candidate
    known = sorted(path.name for home in homes for path in home.glob("*.yaml"))
    raise UserError(f"{name}: no such configuration file; in configs/: {', '.join(dict.fromkeys(known)) or 'none'}")


def print_json(value: Any) -> None:
    """The one JSON object of a command's answer, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
