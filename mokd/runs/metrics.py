"""Metrics: one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mokd.runs.files import replace_text
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of one attempt, continuing after `step`: what an earlier attempt logged beyond it is dropped.

    So a resumed run has every step once. kept, dropped: the records of earlier attempts.
    """

    def __init__(self, run: RunDirectory, attempt: int, step: int) -> None:
        self._run = run
        self._attempt = attempt
        self.kept, self.dropped = keep_up_to(run.metrics_file, step)
        self._stream = open(run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, values: Mapping[str, float | int]) -> None:
        """Appends one record; it must hold `step`. Refused to a leftover attempt."""
        self._run.check_attempt(self._attempt)
        # JSON has no NaN: a number that is none is written as null
        record = {k: v if isinstance(v, int) or math.isfinite(v) else None for k, v in values.items()}
        try:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        except OSError as error:
            log.warning("%s: metrics cannot be written (%s); training goes on", self._run.path, error.strerror)

    def flush(self) -> None:
        """Brings everything to the disk."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            log.warning("%s: metrics cannot be written (%s); training goes on", self._run.path, error.strerror)

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file, oldest first; a line cut off at the end is left out."""
    records = []
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
    except FileNotFoundError:
        pass
    return records


def keep_up_to(path: Path, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Drops the records after a step from a file of them, if there is one; those kept and those dropped."""
    if not path.exists():
        return [], []
    records = read_metrics(path)
    kept = [record for record in records if record.get("step", 0) <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept), durable=True)
    return kept, [record for record in records if record.get("step", 0) > step]


def useful_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """How long the steps of these records have trained, without the saves that training waited for.

    A record's speed is that since the record before.
    """
    timed = [r for r in records if r.get("images_per_second") and r.get("images_seen")]
    seen = [0, *(record["images_seen"] for record in timed)]
    return sum(
        (after - before) / record["images_per_second"] - record.get("save_stall_seconds", 0.0)
        for (before, after), record in zip(pairwise(seen), timed, strict=True)
    )
