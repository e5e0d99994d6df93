"""Sweeps: one run per combination of values, submitted as one job array."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.core.errors import UserError

MAX_RUNS = 1000


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what it changes, and the name that tells it from the others."""

    overrides: tuple[str, ...]
    suffix: str


def points(sweeps: Sequence[str]) -> list[Point]:
    """All combinations of `key=value,value,...`; commas inside brackets and quotes separate nothing.

    >>> [p.overrides for p in points(["seed=0,1", "optim.epochs=5"])]
    [('seed=0', 'optim.epochs=5'), ('seed=1', 'optim.epochs=5')]
    """
    axes = []
    for text in sweeps:
        key, sep, values = text.partition("=")
        given = split_values(values)
        if not sep or not key.strip() or not all(value.strip() for value in given):
            raise UserError(f"--sweep '{text}': write it as key.path=value,value, for example seed=0,1,2")
        axes.append([(key.strip(), value) for value in given])
    combinations = list(itertools.product(*axes))
    if len(combinations) > MAX_RUNS:
        raise UserError(f"--sweep: {len(combinations)} runs, at most {MAX_RUNS} go into one array")
    result = []
    for index, combination in enumerate(combinations):
        words = [f"{key.rpartition('.')[2]}-{value}" for key, value in combination]
        readable = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(words))[:60].strip("_.-")
        result.append(Point(tuple(f"{key}={value}" for key, value in combination), f"{index:03d}-{readable}"))
    return result


def split_values(text: str) -> list[str]:
    """Splits at commas outside of brackets and quotes.

    >>> split_values("[1, 2],3,'a,b'")
    ['[1, 2]', '3', "'a,b'"]
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    return parts
