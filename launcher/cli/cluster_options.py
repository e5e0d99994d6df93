"""The options of `mokd launch` and `mokd resume` that stand for keys of the section `cluster:`, written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Flags = dict[str, Any]


def _option(annotation: Any, text: str | None = None, *names: str) -> Any:
    return Annotated[annotation, typer.Option(*names, help=text, rich_help_panel="Cluster")]


OPTIONS = {
    "nodes": _option(int | None, "nodes"),
    "gpus_per_node": _option(int | None, "GPUs, and ranks, per node"),
    "tasks_per_node": _option(int | None, "ranks per node, if not one per GPU"),
    "cpus_per_task": _option(int | None, "cores per rank"),
    "partition": _option(str | None),
    "account": _option(str | None),
    "qos": _option(str | None),
    "time": _option(str | None, "limit of one slice, for example 24:00:00"),
    "constraint": _option(str | None),
    "exclude": _option(str | None),
    "site": _option(str | None, "profile in ~/.config/mokd/sites/"),
    "sbatch": _option(list[str] | None, "any further parameter, name=value", "--sbatch"),
}


def with_cluster_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `OPTIONS` added to its own; it gets those that were given as its first argument, `flags`."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + added

    def with_flags(**given: Any) -> None:
        flags = {name: value for name in OPTIONS if (value := given.pop(name)) is not None}
        if "sbatch" in flags:
            flags["sbatch"] = _parameters(flags["sbatch"])
        command(flags, **given)

    with_flags.__name__, with_flags.__doc__ = command.__name__, command.__doc__
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_flags


def _parameters(given: list[str]) -> dict[str, str | bool]:
    """`name=value`, or `name` alone for a flag."""
    parts = [text.removeprefix("--").partition("=") for text in given]
    return {key: value if sep else True for key, sep, value in parts}
