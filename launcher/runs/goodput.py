"""How much of the time for which a run held nodes has become training, and where the rest went.

Definitions, as in docs/faults.md: useful is the time of the steps that are in the run now, allocated that between the
start and the end of attempts. The effective training time ratio (Kokolis et al., "Revisiting Reliability in Large-Scale
Machine Learning Research Clusters", 2024; ByteRobust, 2025) takes waiting in the queue into the denominator too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from launcher.runs.records import Ending, Records
from mokd.runs.files import read_json
from mokd.runs.metrics import read_metrics, useful_seconds
from mokd.runs.progress import duration
from mokd.runs.run_directory import RunDirectory


@dataclass(frozen=True)
class AttemptTime:
    """Where the time of one attempt went, in seconds."""

    attempt: int
    started: float
    ended: float
    queued_seconds: float  # from the end of the one before, or the submission, to the start
    first_step: int
    last_step: int
    steps_lost: int  # done in this attempt, and again in a later one
    phases: dict[str, float] = field(default_factory=dict)  # of rank 0; empty where none are on record
    parts: dict[str, float] = field(default_factory=dict)  # of the phases up to the end of the first step


@dataclass(frozen=True)
class PhaseSpan:
    """One stretch of an attempt; times in seconds since the epoch."""

    phase: str
    step: int  # the last one done when it began
    started: float
    ended: float


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, in seconds."""

    allocated_seconds: float
    queued_seconds: float
    useful_seconds: float
    lost_seconds: float  # of steps trained twice, at the mean time of a step
    steps_lost: int
    attempts: list[AttemptTime]

    @property
    def useful_fraction(self) -> float:
        """Useful over allocated time."""
        return self.useful_seconds / self.allocated_seconds if self.allocated_seconds else 0.0

    @property
    def effective_training_time_ratio(self) -> float:
        """Useful time over allocated and queued time."""
        whole = self.allocated_seconds + self.queued_seconds
        return self.useful_seconds / whole if whole else 0.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        ratio = self.effective_training_time_ratio
        return {**asdict(self), "useful_fraction": self.useful_fraction, "effective_training_time_ratio": ratio}

    def line(self) -> str:
        """For people, in one line."""
        text = f"{100 * self.useful_fraction:.0f}% of {duration(self.allocated_seconds)} allocated was training"
        text += f"; {self.steps_lost} steps trained twice"
        if restarts := self.attempts[1:]:
            parts = {"queued": sum(attempt.queued_seconds for attempt in restarts)}
            for name in ("start", "compile"):
                parts[name] = sum(attempt.phases.get(name, 0.0) for attempt in restarts)
            parts["steps again"] = self.lost_seconds
            shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
            text += f"; {len(restarts)} restart{'s' * (len(restarts) > 1)}" + (f": {shown}" if shown else "")
        return text


def goodput(run: RunDirectory, now: float | None = None) -> Goodput:
    """The account of a run so far; steps after the newest checkpoint count as useful until they are lost."""
    attempts = list(_attempts(run, time.time() if now is None else now))
    records = [r for r in read_metrics(run.metrics_file) if r.get("images_per_second") and r.get("images_seen")]
    useful = useful_seconds(records)
    lost = sum(attempt.steps_lost for attempt in attempts)
    return Goodput(
        allocated_seconds=sum(attempt.ended - attempt.started for attempt in attempts),
        queued_seconds=sum(attempt.queued_seconds for attempt in attempts),
        useful_seconds=useful,
        lost_seconds=lost * useful / records[-1]["step"] if records else 0.0,
        steps_lost=lost,
        attempts=attempts,
    )


def _attempts(run: RunDirectory, now: float) -> Iterator[AttemptTime]:
    records = Records(run)
    endings = {ending.attempt: ending for ending in records.endings()}
    submitted = {launch.number: launch.submitted for launch in records.launches()}
    before: AttemptTime | None = None
    for number in range(1, run.current_attempt() + 1):
        facts, ending = records.attempt_facts(number), endings.get(number)
        if not facts:
            continue
        started = float(ending.started if ending else facts["time"])
        phases = read_metrics(run.phases_file(number))
        ended, last = _end(run, number, ending, phases, now)
        # the first step to be done again is the one after the checkpoint that a restart resumes from
        lost = max(0, last - ending.step) if ending and ending.verdict != "done" else 0
        waiting_since = max(before.ended if before else 0.0, submitted.get(facts.get("launch", 0), 0.0))
        before = AttemptTime(
            attempt=number,
            started=started,
            ended=max(started, ended),
            queued_seconds=max(0.0, started - waiting_since) if waiting_since else 0.0,
            first_step=ending.first_step if ending else int(facts.get("step", 0)),
            last_step=last,
            steps_lost=lost,
            phases=durations(phase_spans(phases, started, ended)),
            parts=_parts(phases),
        )
        yield before


def _end(
    run: RunDirectory, number: int, ending: Ending | None, phases: list[dict[str, Any]], now: float
) -> tuple[float, int]:
    """When an attempt ended, or now while it runs, and the last step it did."""
    if ending is not None:
        return ending.ended, max(ending.last_step, ending.first_step)
    mark = run.read_status()
    if mark.get("attempt") == number:
        over = mark.get("state") in ("done", "stopped", "failed")
        return (float(mark["time"]) if over else now), int(mark.get("step", 0))
    newest = phases[-1] if phases else {}
    return float(newest.get("time", 0.0)), int(newest.get("step", 0))


def phase_spans(phases: list[dict[str, Any]], started: float, ended: float) -> list[PhaseSpan]:
    """The phases of rank 0 one after the other; the time before its first word belongs to the start."""
    if not phases:
        return []
    whole = [p for p in phases if "part" not in p]
    named = [(started, "start", 0), *((float(p["time"]), str(p["phase"]), int(p["step"])) for p in whole)]
    moments = [*(moment for moment, _, _ in named), ended]
    return [
        PhaseSpan(name, step, since, max(since, until))
        for (_, name, step), (since, until) in zip(named, pairwise(moments), strict=True)
    ]


def durations(spans: list[PhaseSpan]) -> dict[str, float]:
    """How long each phase took in all."""
    found: dict[str, float] = {}
    for span in spans:
        found[span.phase] = found.get(span.phase, 0.0) + span.ended - span.started
    return found


def _parts(phases: list[dict[str, Any]]) -> dict[str, float]:
    """How long each part took that has come to its end."""
    found: dict[str, float] = {}
    for line, following in pairwise(phases):
        if part := line.get("part"):
            found[part] = found.get(part, 0.0) + float(following["time"]) - float(line["time"])
    return found


def steps_done(run: RunDirectory, attempt: int) -> int:
    """The last step that an attempt is known to have done, by its mark or by its ranks' heartbeats; 0 for none."""
    found = [run.read_status(), *(read_json(path) for path in (run.path / "heartbeat").glob("rank-*.json"))]
    return max((int(mark.get("step", 0)) for mark in found if mark and mark.get("attempt") == attempt), default=0)
