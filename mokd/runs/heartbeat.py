"""What every rank is doing: `heartbeat/rank-<r>.json`, written by a thread, and `attempts/<n>/phases.jsonl`.

The thread shows that a process exists; that it gets on is shown by `beat`, which only the main thread advances. Whoever
judges compares `phase`, `step` and `beat` with what they were before, by a clock of its own: clocks of nodes differ.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from mokd.runs.files import read_json, replace_json
from mokd.runs.processes import process_start
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)

Phase = Literal["start", "compile", "step", "evaluate", "save", "done"]

EVERY_SECONDS = 1.0


class Heartbeat:
    """The heartbeat of one rank in one attempt, from here to `close`; phases of the first rank go on record, and of its
    start the parts.
    """

    def __init__(self, run: RunDirectory, attempt: int, rank: int, before: Mapping[str, float] | None = None) -> None:
        """before: parts of the start that came before the attempt was known, in order, with their beginnings."""
        self._run, self._attempt, self._rank = run, attempt, rank
        self._file = run.heartbeats / f"rank-{rank}.json"
        self._phases = run.phases_file(attempt)
        self._state: dict[str, Any] = {"phase": "", "since": 0.0, "step": 0, "beat": 0, "progressed": 0.0}
        self._written = -1
        self._closed = threading.Event()
        for folder in (self._file.parent, self._phases.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for part, began in (before or {}).items():
            self._record({"time": began, "phase": "start", "part": part, "step": 0})
        self.phase("start", int(run.read_status().get("step", 0)))
        self._write()
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)
        self._thread.start()

    def phase(self, phase: Phase, step: int) -> None:
        """The main thread has got as far as this; a change of phase goes on record."""
        now, state = time.time(), self._state
        changed = state["phase"] != phase
        since = now if changed else state["since"]
        # one assignment: the thread sees the state before or the one after
        self._state = {"phase": phase, "since": since, "step": step, "beat": state["beat"] + 1, "progressed": now}
        if changed:
            self._record({"time": now, "phase": phase, "step": step})

    def part(self, part: str) -> None:
        """The main thread begins this part of its phase, which goes on record."""
        self.beat()
        self._record({"time": time.time(), "phase": self.current, "part": part, "step": self._state["step"]})

    def _record(self, line: dict[str, Any]) -> None:
        if self._rank != 0:
            return
        try:
            with open(self._phases, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s); training goes on", self._phases, error.strerror)

    @property
    def current(self) -> Phase:
        """What the rank is doing."""
        return self._state["phase"]

    def beat(self) -> None:
        """The main thread has got on within its phase."""
        self.phase(self.current, self._state["step"])

    def close(self) -> None:
        """Writes a last time."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _go_on(self) -> None:
        while not self._closed.wait(EVERY_SECONDS):
            self._write()
        self._write()

    def _write(self) -> None:
        state = self._state
        if state["beat"] == self._written:
            return
        process = {"pid": os.getpid(), "process_start": process_start(os.getpid())}
        record = {"attempt": self._attempt, "rank": self._rank, "host": _host(), **process, **state}
        try:
            if self._run.current_attempt() == self._attempt:  # a leftover's heart is nobody's
                replace_json(self._file, record)
                self._written = state["beat"]
        except OSError:
            pass  # a full disk, or one that is away, is not this thread's to report


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def process_began() -> float:
    """When this process was started, in seconds since the epoch; now, where the kernel does not say."""
    now, started = time.time(), process_start(os.getpid())
    if started is None:
        return now
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK"))


def read_heartbeats(run: RunDirectory, attempt: int) -> list[dict[str, Any]]:
    """What the ranks of an attempt were last seen doing, by rank."""
    found = [read_json(path) for path in run.heartbeats.glob("rank-*.json")]
    own = [record for record in found if isinstance(record, dict) and record.get("attempt") == attempt]
    return sorted(own, key=lambda record: int(record["rank"]))


def living_here(run: RunDirectory) -> int | None:
    """The id of a process on this machine that is training the run; None where nobody is known to be."""
    for record in read_heartbeats(run, run.current_attempt()):
        pid, there = int(record.get("pid", 0)), record["host"] == _host() and record["phase"] != "done"
        if there and pid not in (0, os.getpid()) and process_start(pid) == record["process_start"]:
            return pid
    return None


def slowest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The rank that the others wait for: the fewest steps, then the least progress."""
    return min(records, key=lambda record: (record["step"], record["beat"]))
