"""A configuration as values by key path, `branches.0.optimizer.lr`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(document: Any, path: str = "", *, every_list: bool = False) -> Iterator[tuple[str, Any]]:
    """Key paths and values of a JSON document. Lists of sections are opened, others are values unless `every_list`."""
    if isinstance(document, dict):
        inside: Any = document.items()
    elif isinstance(document, list) and (every_list or any(isinstance(part, dict) for part in document)):
        inside = enumerate(document)
    else:
        yield path, document
        return
    for key, part in inside:
        yield from leaves(part, f"{path}.{key}" if path else str(key), every_list=every_list)
