"""Paths in a configuration, which another working directory may read again."""

from __future__ import annotations

from pathlib import Path


def absolute_path(path: Path, before: Path | None = None) -> Path:
    """The path as this working directory means it; or `before`, absolute, where that ends in it."""
    if before is not None and not path.is_absolute() and before.parts[-len(path.parts) :] == path.parts:
        return before
    return path.absolute()
