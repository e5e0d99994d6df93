"""Where the time of a run went, attempt by attempt, on one axis."""

from __future__ import annotations

import time
from dataclasses import replace
from html import escape

from launcher.report.html import table
from launcher.runs.goodput import AttemptTime, Goodput, PhaseSpan, durations, phase_spans
from launcher.runs.records import Records
from mokd.runs.metrics import read_metrics
from mokd.runs.progress import duration
from mokd.runs.run_directory import RunDirectory

# in the order of the legend; the names of the style sheet's colours
PHASES = ("queued", "start", "compile", "step", "evaluate", "save", "lost", "other")
_NARROWEST = 0.001  # of the axis: what is narrower cannot be seen, and a long run has thousands


def attempt_spans(run: RunDirectory, attempt: AttemptTime) -> list[PhaseSpan]:
    """The time in the queue and the phases of an attempt; steps that were done again later are `lost`."""
    resumed = {ending.attempt: ending.step for ending in Records(run).endings()}.get(attempt.attempt)
    spans = phase_spans(read_metrics(run.phases_file(attempt.attempt)), attempt.started, attempt.ended)
    if not spans:
        spans = [PhaseSpan("other", attempt.first_step, attempt.started, attempt.ended)]
    if attempt.steps_lost and resumed is not None:
        # every checkpoint begins a stretch of its own
        spans = [replace(s, phase="lost") if s.phase == "step" and s.step >= resumed else s for s in spans]
    spans = [replace(s, phase=s.phase if s.phase in PHASES else "other") for s in spans]
    if attempt.queued_seconds:
        spans.insert(0, PhaseSpan("queued", 0, attempt.started - attempt.queued_seconds, attempt.started))
    return spans


def timeline(run: RunDirectory, account: Goodput) -> str:
    """The section's HTML: the goodput line, a bar per attempt, the same as a table, why attempts ended."""
    if not account.attempts:
        return "<p>The run has not begun.</p>"
    every = {attempt.attempt: attempt_spans(run, attempt) for attempt in account.attempts}
    begin = min(spans[0].started for spans in every.values())
    whole = max(max(span.ended for spans in every.values() for span in spans) - begin, 1e-9)
    used = [name for name in PHASES if any(s.phase == name for spans in every.values() for s in spans)]
    bars, rows = [], []
    for attempt in account.attempts:
        sums = durations(every[attempt.attempt])
        told = ", ".join(f"{name} {duration(sums[name])}" for name in PHASES if sums.get(name, 0.0) >= 0.5)
        head = f"Attempt {attempt.attempt}, steps {attempt.first_step} to {attempt.last_step}"
        inside = "".join(
            f'<i style="left:{100 * (s.started - begin) / whole:.3f}%;width:{100 * (s.ended - s.started) / whole:.3f}%;'
            f'background:var(--{s.phase})"></i>'
            for s in _visible(every[attempt.attempt], whole)
        )
        bars.append(
            f'<div>{head}</div><div class="bar" role="img" aria-label="{escape(f"{head}: {told}")}">{inside}</div>'
        )
        times = [duration(sums[name]) if name in sums else "-" for name in used]
        rows.append([str(attempt.attempt), _clock(attempt.started), *times, str(attempt.steps_lost)])
    legend = "".join(f'<li><i style="background:var(--{name})"></i>{name}</li>' for name in used)
    columns = ["attempt", "started (UTC)", *used, "steps lost"]
    return (
        f"<p><strong>Goodput:</strong> {escape(account.line())}.</p>"
        f'<ul class="legend">{legend}</ul>{"".join(bars)}'
        f'<p class="quiet">The axis begins {_clock(begin)} UTC and is {duration(whole)} long. '
        "Lost: steps that a later attempt did again.</p>"
        + table("Time of every attempt by phase", columns, rows)
        + _endings(run)
    )


def _endings(run: RunDirectory) -> str:
    rows = [
        [str(e.attempt), e.verdict, e.kind, e.reason or "-", str(e.step), e.nodes or "-", ", ".join(e.blamed) or "-"]
        for e in Records(run).endings()
    ]
    if not rows:
        return ""
    columns = ["attempt", "then", "kind", "reason", "resumes from step", "nodes", "blamed"]
    return "<h3>Restarts and ends</h3>" + table("How every attempt ended", columns, rows)


def _visible(spans: list[PhaseSpan], whole: float) -> list[PhaseSpan]:
    """The spans with what is too narrow to be seen given to the one before, and equal neighbours as one."""
    found: list[PhaseSpan] = []
    for span in spans:
        narrow = span.ended - span.started < _NARROWEST * whole
        if found and (narrow or span.phase == found[-1].phase) and found[-1].phase != "queued":
            found[-1] = replace(found[-1], ended=span.ended)
        else:
            found.append(span)
    return found


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))
