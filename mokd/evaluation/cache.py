"""Features on disk, so that a checkpoint's are computed once: `eval/features/<digest>/`, complete or absent.

A directory holds `.npy` files of consecutive rows and `index.json` with their checksums. It is filled under a hidden
name and renamed. Which one is right follows from its digest: of the weights, the data, and how they were read.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.sampling.order import Int64Array
from mokd.distributed.process_group import Ranks, barrier, broadcast_from_main, gather_objects
from mokd.evaluation.features import first_bad
from mokd.runs.files import beside_of, file_checksum, read_json, replace_json, sync_file

log = logging.getLogger(__name__)

FORMAT = 1
FILE_ROWS = 16384
LEFTOVER_SECONDS = 24 * 3600.0
IN_MEMORY_BYTES = 2 << 30


class CachedFeatures:
    """Features `[N, D]` in fp32, in the data set's order, as arrays of consecutive rows."""

    def __init__(self, parts: Sequence[NDArray[np.float32]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.size, self.width = int(self._ends[-1]), self._parts[0].shape[1]

    def take(self, rows: Int64Array) -> Tensor:
        """The features of some rows, in the order given, in new memory on the CPU."""
        out = np.empty((len(rows), self.width), np.float32)
        where = np.searchsorted(self._ends, rows, side="right")
        for i in np.unique(where):
            mine = where == i
            out[mine] = self._parts[i][rows[mine] - self._ends[i] + len(self._parts[i])]
        return torch.from_numpy(out)

    def blocks(self, low: int, high: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Rows `low` to `high` in blocks, each with the number of its first row."""
        for start in range(low, high, size):
            yield start, self.take(np.arange(start, min(start + size, high)))


def open_features(directory: Path) -> CachedFeatures:
    """The features in a directory that is whole; large ones stay on the disk and are mapped into memory."""
    files = (read_json(directory / "index.json") or {})["files"]
    order = sorted(files, key=lambda name: files[name]["first_row"])
    parts = [np.load(directory / name, mmap_mode="r") for name in order]
    return CachedFeatures([np.concatenate(parts)] if sum(part.nbytes for part in parts) <= IN_MEMORY_BYTES else parts)


def is_whole(directory: Path) -> bool:
    """Whether a directory holds features and every checksum is right; a warning where something is damaged."""
    if not directory.exists():
        return False
    index: Any = read_json(directory / "index.json")
    try:
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}")
        for name, file in index["files"].items():
            if file_checksum(directory / name) != file["sha256"]:
                raise ValueError(name)
        return True
    except (OSError, TypeError, KeyError, ValueError) as error:
        log.warning("%s: damaged (%s); the features are computed again", directory, error)
        return False


class CacheWriter:
    """Writes one rank's rows, from `first_row` on; `publish`, called by all ranks, makes all ranks' files the cache."""

    def __init__(self, directory: Path, first_row: int, ranks: Ranks) -> None:
        self._directory, self._ranks = directory, ranks
        self._beside = broadcast_from_main(beside_of(directory))
        self._beside.mkdir(parents=True, exist_ok=True)
        self._rows: list[Tensor] = []  # not written yet, from `_first_row` on
        self._first_row = self._next_row = first_row
        self._files: dict[str, dict[str, Any]] = {}
        self.bad_row: int | None = None

    def add(self, features: Tensor) -> None:
        """Appends rows `[B, D]`."""
        if self.bad_row is None and (bad := first_bad(features)) is not None:
            self.bad_row = self._next_row + bad
        self._rows.append(features.cpu())
        self._next_row += len(features)
        if self._next_row - self._first_row >= FILE_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._next_row == self._first_row:
            return
        path = self._beside / f"rows-{self._first_row:09d}.npy"
        np.save(path, torch.cat(self._rows).numpy(), allow_pickle=False)
        sync_file(path)
        self._files[path.name] = {"first_row": self._first_row, "sha256": file_checksum(path)}
        self._rows, self._first_row = [], self._next_row

    def publish(self, what: dict[str, Any]) -> None:
        """Renames the directory into place; `what` says what the features are of."""
        self._flush()
        everybody = gather_objects(self._files)
        if self._ranks.is_main:
            files = {name: file for part in everybody for name, file in part.items()}
            replace_json(self._beside / "index.json", {"format": FORMAT, "files": files, **what}, durable=True)
            shutil.rmtree(self._directory, ignore_errors=True)  # a damaged one
            os.rename(self._beside, self._directory)
        barrier()

    def discard(self) -> None:
        """Removes what was written."""
        if self._ranks.is_main:
            shutil.rmtree(self._beside, ignore_errors=True)


def prune(folder: Path, step: int, slots: Collection[str]) -> None:
    """Removes the features of other steps than `step`, not those of untrained networks (step 0), those whose `slot`
    is about to be filled anew, and what evaluations that were cut off a day ago have left.
    """
    for path in folder.glob("*"):
        index = read_json(path / "index.json")
        hidden = path.name.startswith(".")
        if hidden and time.time() - path.stat().st_mtime < LEFTOVER_SECONDS:
            continue
        current = isinstance(index, dict) and (step == 0 or index["step"] in (0, step)) and index["slot"] not in slots
        if hidden or not current:
            shutil.rmtree(path, ignore_errors=True)
