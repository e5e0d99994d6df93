"""The output of a run's ranks, over all its jobs and restarts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.core.errors import UserError
from launcher.runs.records import Records
from mokd.runs.run_directory import RunDirectory

_POLL_SECONDS = 0.5
_CHUNK = 1 << 16


def log_files(run: RunDirectory, rank: int) -> list[Path]:
    """A rank's stdout and stderr files, oldest job first; UserError when there are none."""
    found = []
    for launch in Records(run).launches():
        if launch.job_id is not None:
            folder = Path(launch.folder)
            found += [folder / f"{launch.job_id}_{rank}_log.{kind}" for kind in ("out", "err")]
    existing = [path for path in found if path.exists()]
    if not existing:
        ranks = {match[1] for path in run.jobs.glob("*_log.err") if (match := re.search(r"_(\d+)_log", path.name))}
        hint = f"; there are logs of ranks 0 to {max(map(int, ranks))}" if ranks else ""
        if not Records(run).launches() and run.current_attempt():
            hint = f": mokd train writes to its terminal; what it did: mokd status {run.path}, {run.metrics_file}"
        raise UserError(f"{run.path}: no output of rank {rank} yet{hint}")
    return existing


def read_logs(run: RunDirectory, rank: int, lines: int | None) -> Iterator[str]:
    """What a rank has written so far, of each file at most the last `lines` lines."""
    for path in log_files(run, rank):
        text = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        yield from text if lines is None else text[-lines:]


def follow(run: RunDirectory, rank: int, ended: Callable[[], bool]) -> Iterator[str]:
    """What a rank writes from now on, restarts and new jobs included, until the run has ended."""
    positions: dict[Path, int] = {path: path.stat().st_size for path in log_files(run, rank)}
    while True:
        last_round = ended()  # asked first: what was written before the end is still shown
        for path in log_files(run, rank):
            with open(path, "rb") as stream:
                stream.seek(positions.get(path, 0))
                while chunk := stream.read(_CHUNK):
                    yield chunk.decode("utf-8", "replace")
                positions[path] = stream.tell()
        if last_round:
            return
        time.sleep(_POLL_SECONDS)
