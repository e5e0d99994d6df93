"""What the launcher itself remembers of a run, under `jobs/`: launches, how each attempt ended, cancellations.

The scheduler forgets a job minutes after its end and SLURM without accounting never knew its history. These files are
the history. Each is written once, by rename, so that a reader never sees half of one.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_pipeline.core.errors import UserError
from launcher.runs.permissions import make_private
from mokd.runs.files import create_json, read_json, replace_json
from mokd.runs.run_directory import RunDirectory

Verdict = Literal["done", "requeued", "stopped", "failed", "cancelled", "superseded"]


@dataclass(frozen=True)
class Launch:
    """One submission of a run."""

    number: int
    kind: Literal["slurm", "local"]
    cluster: dict[str, Any]
    folder: str  # of submitit's files
    job_id: str | None = None
    submitted: float = 0.0
    host: str = ""
    user: str = ""
    process_start: str | None = None  # of a local job's controller, whose process id alone may be reused
    cancelled: float | None = None
    code: str | None = None  # digest of the snapshot
    final_state: str | None = None  # as the scheduler last told it, once it was final


@dataclass(frozen=True)
class Ending:
    """How one attempt ended, and what was decided."""

    attempt: int
    launch: int
    verdict: Verdict
    kind: str  # "signal", "time limit", "failure", ...: what counts against the run and what does not
    reason: str
    step: int  # that a restart resumes from
    job_id: str | None = None
    nodes: str = ""
    blamed: list[str] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0
    first_step: int = 0  # that the attempt resumed from
    last_step: int = 0  # that it is known to have done


class Records:
    """The launcher's files of one run."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self._launches = run.jobs / "launches"
        self._endings = run.jobs / "endings"

    def launches(self) -> list[Launch]:
        """All submissions, oldest first."""
        return [Launch(**found) for found in _read_all(self._launches)]

    def last_launch(self) -> Launch | None:
        """The newest submission, which alone may act for the run."""
        return next(iter(reversed(self.launches())), None)

    def new_launch(self, kind: Literal["slurm", "local"], cluster: dict[str, Any], folder: Path) -> Launch:
        """Registers a submission; from now on earlier ones are superseded."""
        make_private(self.run.jobs)
        record = Launch(
            0, kind, cluster, str(folder), submitted=time.time(), host=socket.gethostname(), user=getpass.getuser()
        )
        try:
            self._launches.mkdir(exist_ok=True)
            while True:
                # by name: the number of a file that an interrupted launch has left empty is taken too
                number = max((int(path.stem) for path in self._launches.glob("[0-9]*.json")), default=0) + 1
                numbered = replace(record, number=number)
                with suppress(FileExistsError):  # somebody else took the number
                    create_json(self._path(number), asdict(numbered))
                    return numbered
        except OSError as error:
            raise UserError(f"{self._launches}: the launch cannot be recorded: {error.strerror}") from None

    def write_launch(self, launch: Launch) -> Launch:
        """Replaces what is known of a submission."""
        replace_json(self._path(launch.number), asdict(launch), durable=True)
        return launch

    def drop_launch(self, launch: Launch) -> None:
        """Forgets a submission that the scheduler refused."""
        self._path(launch.number).unlink(missing_ok=True)

    def endings(self) -> list[Ending]:
        """How the attempts ended, oldest first; the current one is missing while it runs."""
        return [Ending(**found) for found in _read_all(self._endings)]

    def write_ending(self, ending: Ending) -> None:
        """Records the end of an attempt."""
        self._endings.mkdir(parents=True, exist_ok=True)
        replace_json(self._endings / f"{ending.attempt:04d}.json", asdict(ending), durable=True)

    def attempt_facts(self, attempt: int) -> dict[str, Any]:
        """What an attempt registered when it started."""
        return read_json(self.run.path / "attempts" / f"{attempt:04d}.json") or {}

    def rank_failures(self, attempt: int) -> list[dict[str, Any]]:
        """The errors that ranks of an attempt have left, earliest first."""
        found = [read_json(path) for path in self.rank_folder(attempt).glob("rank-*.json")]
        return sorted((record for record in found if record), key=lambda record: float(record["time"]))

    def rank_folder(self, attempt: int) -> Path:
        """Where the ranks of an attempt leave their errors."""
        return self.run.jobs / "errors" / f"{attempt:04d}"

    def _path(self, number: int) -> Path:
        return self._launches / f"{number:04d}.json"


def checkpoint_step(run: RunDirectory) -> int:
    """The newest published checkpoint's step, 0 without any; needs no torch."""
    try:
        names = [entry.name for entry in os.scandir(run.checkpoints)]
    except OSError:
        return 0
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))), default=0)


def _read_all(folder: Path) -> list[dict[str, Any]]:
    found = [read_json(path) for path in sorted(folder.glob("[0-9]*.json"))]
    return [record for record in found if isinstance(record, dict)]
