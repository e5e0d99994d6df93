"""Image data sets of Hugging Face on disk: Parquet files, and the Arrow files of `save_to_disk`. Needs pyarrow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from data_pipeline.beton.pixels import Unusable
from data_pipeline.beton.places import Found
from data_pipeline.core.errors import UserError

_IMAGES, _LABELS = ("image", "img", "jpg", "png", "picture"), ("label", "labels", "cls", "class")
_GROUPS_KEPT = 3  # threads that are a few images ahead of each other read from two
_reading = Lock()


@dataclass(frozen=True)
class Columns:
    """The columns that hold images and labels, where a table leaves a doubt."""

    image: str | None = None
    label: str | None = None


def tables_saved_to_disk(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote, none for any other folder. UserError for several."""
    try:
        if (splits := folder / "dataset_dict.json").is_file():
            names = ", ".join(json.loads(splits.read_text())["splits"])
            raise UserError(f"{folder}: holds several parts of a data set; give the folder of one of them: {names}")
        if not (state := folder / "state.json").is_file():
            return []
        return [folder / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def images_in_table(path: Path, columns: Columns) -> tuple[Found, tuple[str, ...] | None]:
    """The images of a table in its order, and the names of its classes where it has them by number. UserError."""
    arrow = _pyarrow(path)
    table: _Parquet | _Arrow
    try:
        table = _Parquet(path, arrow) if path.suffix.lower() == ".parquet" else _Arrow(path, arrow)
        features = _features(table.schema)
        table.image = _choose(path, "image", columns.image, table.schema, features) or ""
        label = _choose(path, "label", columns.label, table.schema, features)
        values = table.labels(label) if label else [None] * table.rows
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as a table: {str(error).splitlines()[0]}") from None
    names = features.get(label or "", {}).get("names")
    found: Found = []
    for row, value in enumerate(values):
        if not isinstance(value, int | str | None) or (names and isinstance(value, int) and value >= len(names)):
            raise UserError(f"{path}: row {row}: '{label}' is {value!r}, which is none of its classes")
        unknown = value is None or (isinstance(value, int) and value < 0)  # as Hugging Face marks test images
        name = names[value] if names and isinstance(value, int) and not unknown else str(value)
        found.append((None if unknown else name, Cell(table, row)))
    return found, tuple(names) if names else None


@dataclass(frozen=True, slots=True)
class Cell:
    """An image in a row of a table."""

    table: _Parquet | _Arrow
    row: int

    def __str__(self) -> str:
        return f"{self.table.path}/{self.row}"

    def read(self) -> bytes:
        """Its bytes, or those of the file that it names."""
        try:
            value = self.table.cell(self.row)
        except Exception as error:  # damage shows in many ways, and concerns this part of the table alone
            raise Unusable(f"its table cannot be read: {str(error).splitlines()[0]}") from None
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return (self.table.path.parent / value["path"]).read_bytes()
            value = value.get("bytes")
        if value is None:
            raise Unusable("no image in this row")
        if not isinstance(value, bytes):
            raise Unusable(f"holds {type(value).__name__}, not the bytes of an image file")
        return value


class _Parquet:
    """A Parquet file: a cell is read with its row group, of which the last few are kept for its neighbours."""

    def __init__(self, path: Path, arrow: Any) -> None:
        self.path, self.image = path, ""
        with _open_parquet(path) as file:
            self.schema, meta = file.schema_arrow, file.metadata
            self.rows = meta.num_rows
            self._sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]

    def labels(self, column: str) -> list[Any]:
        with _open_parquet(self.path) as file:
            return list(file.read(columns=[column]).column(0).to_pylist())

    def cell(self, row: int) -> Any:
        group = 0
        while row >= self._sizes[group]:
            row, group = row - self._sizes[group], group + 1
        with _reading:  # each group once, by whichever thread comes first
            column = _row_group(self.path, group, self.image)
        return column[row].as_py()


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


@lru_cache(_GROUPS_KEPT)
def _row_group(path: Path, group: int, column: str) -> Any:
    with _open_parquet(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


class _Arrow:
    """An Arrow file or stream, mapped into memory."""

    def __init__(self, path: Path, arrow: Any) -> None:
        self.path, self.image = path, ""
        mapped = arrow.memory_map(str(path))
        try:
            self._table = arrow.ipc.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            self._table = arrow.ipc.open_file(mapped).read_all()
        self.schema, self.rows = self._table.schema, self._table.num_rows

    def labels(self, column: str) -> list[Any]:
        return list(self._table.column(column).to_pylist())

    def cell(self, row: int) -> Any:
        return self._table.column(self.image)[row].as_py()


def _choose(path: Path, kind: str, wanted: str | None, schema: Any, features: dict[str, Any]) -> str | None:
    """The column of images or labels: as asked, as declared, or by its usual names."""
    option = f"--{kind}-column"
    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(f"{path}: {option} {wanted}: no such column; there are {', '.join(schema.names)}")
        return wanted
    marked = {"image": "Image", "label": "ClassLabel"}[kind]
    found = [name for name in schema.names if features.get(name, {}).get("_type") == marked]
    found = found or [name for name in (_IMAGES if kind == "image" else _LABELS) if name in schema.names]
    if len(found) == 1 or (kind == "label" and not found):
        return found[0] if found else None
    state = f"more than one column of {kind}s" if found else f"no column of {kind}s"
    raise UserError(f"{path}: {state}; name one of {', '.join(found or schema.names)} with {option}")


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face says of the columns, by name."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError):
        return {}


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(f'{path}: tables are read by pyarrow; install it with: pip install "mokd[tables]"') from None
    return pyarrow
