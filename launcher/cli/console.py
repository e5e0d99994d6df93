"""What commands share: finding a configuration, exit codes, JSON, tables and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline.core.errors import UserError

# everything that is not the answer itself goes to stderr
messages = Console(stderr=True, highlight=False, soft_wrap=True)


def find_config(name: str) -> Path:
    """A configuration by path, or by bare name in `configs/` of the working directory or of the installation."""
    given = Path(name)
    homes = (Path("configs"), Path(__file__).resolve().parents[2] / "configs")
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


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function `(done, total)` that draws a bar with rate and ETA on a terminal, and a line per tenth in a log."""
    if messages.is_terminal:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=messages) as bar:
            task = bar.add_task(title, total=None, rate="")

            def draw(done: int, total: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, total=total, rate=f"{speed:.0f}/s" if speed else "")

            yield draw
        return
    tenth = -1

    def line(done: int, total: int) -> None:
        nonlocal tenth
        now = 10 * done // max(total, 1)
        if now > tenth:
            tenth = now
            messages.print(f"{title}: {done} of {total}", markup=False)

    yield line
