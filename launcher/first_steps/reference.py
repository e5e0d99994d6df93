"""Every key of a configuration with its default and meaning, out of the schema: `mokd config --keys`.

`python -m launcher.first_steps.reference` writes docs/configuration.md; a test holds the page to it.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from data_pipeline.core.schema import models_in
from launcher.config import ClusterConfig
from mokd.config import RunConfig

PAGE = Path("docs/configuration.md")
_HEAD = """# Configuration

Every key, its default and what it means; made from the schema by `python -m launcher.first_steps.reference`.
`mokd config CONFIG` prints a configuration with every default written out, with `--check` after a look at networks,
data, first weights and cluster; `mokd config --keys data` tells this of a section. Any key can be given on the command
line: `mokd train demo.yaml optim.epochs=3 branches.vit.weight=0.1`.
"""


@dataclass(frozen=True)
class Key:
    """One key. name: with dots; allowed: its values; default: as JSON, empty for a key that must be given."""

    name: str
    allowed: str
    default: str
    meaning: str


def all_keys() -> Iterator[Key]:
    """All keys of a run's configuration, the section `cluster` last, in the order of the schema."""
    yield from _keys(RunConfig, "", None)
    yield from _keys(ClusterConfig, "cluster.", None)


def page() -> str:
    """The table of all keys as a page."""
    lines, section = [_HEAD], ""
    for key in all_keys():
        head = key.name.partition(".")[0] if "." in key.name else "run"
        if head != section:
            lines.append(f"\n## {head}\n\n| key | values | default | |\n|---|---|---|---|\n")
            section = head
        default = f"`{key.default}`" if key.default else "to be given"
        lines.append(f"| `{key.name}` | {key.allowed.replace('|', ', ')} | {default} | {key.meaning} |\n")
    return "".join(lines)


def _keys(model: type[BaseModel], prefix: str, defaults: BaseModel | None) -> Iterator[Key]:
    """defaults: an object whose values stand in for the model's own defaults."""
    for name, field in model.model_fields.items():
        sections = list(dict.fromkeys(models_in(field.annotation)))
        own = getattr(defaults, name) if isinstance(defaults, model) else field.get_default(call_default_factory=True)
        inside = f"{prefix}{name}[N]." if get_origin(field.annotation) is tuple and sections else f"{prefix}{name}."
        for section in sections:
            found = _keys(section, inside, own if isinstance(own, BaseModel) else None)
            # of objectives, whose sections exclude each other, each key says whose it is
            kind = section.model_fields.get("kind") if len(sections) > 1 else None
            for key in found:
                where = f"{kind.default}: " if kind is not None and key.name != f"{inside}kind" else ""
                yield Key(key.name, key.allowed, key.default, where + key.meaning)
        if not sections and f"{prefix}{name}" != "cluster":
            default = "" if own is PydanticUndefined else json.dumps(own, default=str)
            yield Key(f"{prefix}{name}", _allowed(field.annotation), default, field.description or "")


def _allowed(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join("null" if argument is type(None) else _allowed(argument) for argument in arguments)
    if origin is tuple:
        return "list of " + _allowed(arguments[0])
    if origin is dict or annotation is dict:
        return "mapping"
    if arguments and hasattr(annotation, "__metadata__"):
        return _allowed(arguments[0])
    names = {bool: "true|false", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
