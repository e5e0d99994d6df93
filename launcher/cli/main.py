"""The command line `mokd`."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from data_pipeline.core.errors import DataError, UserError
from launcher.cli import analyze, bench, compare, data, doctor, evaluate, export, first_steps, jobs, report, site, train
from launcher.cli.console import messages
from launcher.slurm.client import SchedulerError
from mokd import __version__

app = typer.Typer(
    name="mokd",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# in the order in which the help lists them
for commands in (first_steps, data, train, evaluate, jobs, compare, analyze, export, report, bench, doctor, site):
    commands.register(app)


USUAL_WAY = (
    ("mokd demo", "the whole way in minutes, on images that are drawn"),
    ("mokd convert IMAGES OUT.beton", "your images in one file"),
    ("mokd init", "a configuration for them and for this machine"),
    ("mokd train CONFIG", "train here; on a SLURM cluster: mokd launch CONFIG"),
    ("mokd report RUN", "look at it"),
    ("mokd export RUN --branch NAME", "take a network home"),
)


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Train two different vision networks together, without labels, and evaluate what they have learned."""
    if version:
        print(f"mokd {__version__}")
    elif context.invoked_subcommand is None:
        print("The usual way:\n")
        for command, what in USUAL_WAY:
            print(f"  {command:32} {what}")
        print("\nAll commands: mokd --help")


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. A mistake of the user ends in one line and exit status 2, a failed run in 1, as does a file
    that cannot be read or written.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app(arguments)
    except UserError as error:
        messages.print(f"[bold red]error:[/] {escape(error)}")
        sys.exit(2)
    except (DataError, SchedulerError) as error:
        messages.print(f"[bold red]failed:[/] {escape(error)}")
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise  # not a file that somebody could mend
        messages.print(f"[bold red]failed:[/] {escape(f'{error.filename}: {error.strerror}')}")
        sys.exit(1)


def escape(error: Exception | str) -> str:
    """An error's text with nothing in it that rich would take for markup, on one line."""
    return " ".join(str(error).split()).replace("[", r"\[")


if __name__ == "__main__":
    main()
