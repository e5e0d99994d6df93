"""A list of image files: a path and a class on every line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.beton.places import Found
from data_pipeline.core.errors import UserError


def images_listed(path: Path) -> Found:
    """The images of a list: `.csv` (path,class), `.tsv`, or `.txt` (the last word of a line is the class).

    Paths are relative to the list's folder. A first line `path,label` is a heading. Lists without classes have a path
    alone on every line. UserError naming the line that is of another form.
    """
    found: Found = []
    forms = set()
    for number, row in _rows(path):
        forms.add(len(row))
        if len(row) > 2 or len(forms) > 1 or not all(row):
            line = path.suffix.lower().replace(".txt", " ").replace(".csv", ",").replace(".tsv", "<tab>")
            raise UserError(f"{path}: line {number}: expected path{line}class on every line, or a path alone on each")
        found.append((row[1] if len(row) == 2 else None, path.parent / row[0]))
    return found


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    kind = path.suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows: Iterable[list[str]] = csv.reader(file, delimiter="," if kind == ".csv" else "\t")
            if kind == ".txt":  # a path may hold blanks; a line of one word is a path
                rows = (line.strip().rsplit(maxsplit=1) for line in file)
            for number, words in enumerate(rows, start=1):
                row = [word.strip() for word in words]
                heading = number == 1 and row[:1] and row[0].lower() in ("path", "file", "filename", "image")
                if any(row) and not heading:
                    yield number, row
    except csv.Error as error:
        raise UserError(f"{path}: not a list of images: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
