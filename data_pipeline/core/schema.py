"""Strict typed configuration: the base model, YAML reading, `key=value` overrides, error lines.

Every package builds its own section on `StrictModel`. Nothing here imports torch, so that a login
node validates a configuration in a fraction of a second.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.core.errors import UserError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]

Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """Base of every configuration section: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, strict=True)


class _YamlLoader(yaml.SafeLoader):
    """`yaml.safe_load` that reads `1e-4` as a number, which YAML 1.1 takes for text to everyone's surprise, and refuses
    a key that stands twice, of which the last would win in silence.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the safe loader. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_YamlLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError when it is missing, unreadable or not a mapping."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}:" if where else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, found {type(raw).__name__}")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with every `key.path=value` applied; lists are indexed by number or by an item's `name`.

    >>> apply_overrides({"optim": {"epochs": 1}}, ["optim.epochs=5"])
    {'optim': {'epochs': 5}}
    """
    result = json.loads(json.dumps(raw, default=str))
    for text in overrides:
        path, sep, value = text.partition("=")
        keys = path.strip().split(".")
        if not sep or not all(keys):
            raise UserError(f"override '{text}': write it as key.path=value, for example optim.epochs=5")
        try:
            parsed = parse_yaml(value) if value.strip() else None
        except yaml.YAMLError:
            parsed = value
        node: Any = result
        for key in keys[:-1]:
            node = _descend(node, key, text)
        if isinstance(node, list):
            node[_position(node, keys[-1], text)] = parsed
        elif isinstance(node, dict):
            node[keys[-1]] = parsed
        else:
            raise UserError(f"override '{text}': '{'.'.join(keys[:-1])}' holds a single value, not a section")
    return result


def _descend(node: Any, key: str, text: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, text)]
    if not isinstance(node, dict):
        raise UserError(f"override '{text}': '{key}' lies below a single value, not a section")
    if node.get(key) is None:
        node[key] = {}
    elif isinstance(node[key], str):
        node[key] = {"kind": node[key]}  # the short form of a section that has a kind
    return node[key]


def _position(items: list[Any], key: str, text: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = [str(name) for name in names if name]
    raise UserError(f"override '{text}': no item '{key}'; there are {len(items)}: {', '.join(known) or '0 to n-1'}")


def validate(model: type[Model], raw: dict[str, Any], source: str) -> Model:
    """`raw` as a validated `model`; UserError naming `source`, key path, what was given and what was expected."""
    try:
        # through JSON: strict types, yet lists become tuples and text becomes a path
        return model.model_validate_json(json.dumps(_complete(model, raw), default=str))
    except ValidationError as error:
        raise UserError(_explain(model, error, source)) from None


def load(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """The configuration file at `path`, with overrides, as a validated `model`."""
    raw = read_yaml(path)
    return validate(model, apply_overrides(raw, overrides), str(path))


def dump_yaml(config: BaseModel) -> str:
    """The configuration, every default written out, as YAML that reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, width=110)


def _explain(model: type[BaseModel], error: ValidationError, source: str) -> str:
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    tail = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    # a tagged union adds its tag to the path: show only what the file spells
    keys = [str(part) for part in first["loc"]]
    shown = _walk(model, keys)[1]
    if first["type"] == "extra_forbidden":
        shown.append(keys[-1])
    key = ".".join(shown) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = sorted(_walk(model, keys[:-1])[0])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{source}: {key}: unknown key; {hint}{tail}"
    if first["type"] == "missing":
        return f"{source}: {key}: required, but not given{tail}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    given = first["input"]
    if first["type"] == "union_tag_invalid":  # pydantic points at the section, not at the key that chooses its kind
        context = first["ctx"]
        key = f"{key}.{context['discriminator'].strip(chr(39))}"
        given, message = context["tag"], context["expected_tags"].replace(", ", " or ")
    if first["type"] == "value_error" and isinstance(given, dict):
        return f"{source}: {key}: {message}{tail}"
    text = json.dumps(given, default=str)
    expected = message if first["type"] == "value_error" else f"expected {message}"
    return f"{source}: {key}: given {text if len(text) < 80 else text[:77] + '...'}, {expected}{tail}"


def _complete(model: type[BaseModel], raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with short forms written out and partly given sections filled up from their defaults.

    `section: name` stands for `section: {kind: name}`, and a section of several kinds that names none is of its
    default's; a section that has a default as a whole keeps what the file does not mention, so that
    `views.local_crops.count=4` changes the count and nothing else.
    """
    result = dict(raw)
    for key, value in raw.items():
        field = _field(model, key)
        if field is None:
            continue
        if isinstance(value, str) and any("kind" in m.model_fields for m in _models_in(field.annotation)):
            result[key] = {"kind": value}
        elif isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            default = field.default
            base = default.model_dump(mode="json", by_alias=True) if isinstance(default, BaseModel) else {}
            filled = _complete(field.annotation, value)
            result[key] = {**base, **filled}
        elif isinstance(value, dict) and field.discriminator and isinstance(field.default, BaseModel):
            result[key] = {field.discriminator: getattr(field.default, field.discriminator), **value}
    return result


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _models_in(part)


def _field(model: type[BaseModel], key: str) -> Any:
    for name, field in model.model_fields.items():
        if key in (field.alias, name):
            return field
    return None


def _walk(model: type[BaseModel], keys: Sequence[str]) -> tuple[set[str], list[str]]:
    """The keys known at the place `keys` leads to, and `keys` without the tags pydantic put between."""
    candidates = [model]
    shown: list[str] = []
    for key in keys:
        found = [field for m in candidates if (field := _field(m, key)) is not None]
        if found:
            candidates = [m for field in found for m in _models_in(field.annotation)]
            shown.append(key)
        elif key.isdigit():
            shown.append(key)
        else:
            # not a key of the file but a label that pydantic puts in for a member of a union
            candidates = [m for m in candidates if key in (m.__name__, *_tags(m))] or candidates
    known = {field.alias or name for m in candidates for name, field in m.model_fields.items()}
    return known, shown


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("kind")
    return tuple(map(str, get_args(field.annotation))) if field and get_origin(field.annotation) is not Union else ()
