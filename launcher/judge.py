"""What to do after an attempt has ended: a pure function of what is known about the end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.config import ClusterConfig
from launcher.records import Ending, Verdict

# endings of these kinds are nobody's fault: they never count as failures
BLAMELESS = frozenset({"signal", "preempted", "time limit", "requeued", "node lost", "lost"})
_ASKED = re.compile(r"SIG(TERM|USR1|USR2|INT)|Terminated|User defined signal|another rank was asked")


@dataclass(frozen=True)
class TaskError:
    """A line in which srun tells that a task ended badly."""

    node: str
    task: str
    what: str


@dataclass(frozen=True)
class Facts:
    """Everything known about the end of an attempt."""

    exit_code: int
    mark: dict[str, Any] = field(default_factory=dict)  # status.json, if this attempt wrote it
    cause: str | None = None  # why SLURM ended the job: "PREEMPTION", "TIME LIMIT", "CANCELLED", ...
    task_errors: Sequence[TaskError] = ()
    rank_failures: Sequence[dict[str, Any]] = ()
    signals: Sequence[str] = ()  # that reached the batch step
    hang: str | None = None
    seconds_left: float = float("inf")  # until the time limit
    superseded: bool = False


@dataclass(frozen=True)
class Judgement:
    """What happened and what follows."""

    verdict: Verdict
    kind: str
    reason: str
    blamed: list[str] = field(default_factory=list)


def judge(facts: Facts, history: Sequence[Ending], step: int, cluster: ClusterConfig) -> Judgement:
    """The consequence of an attempt's end. `step` is what a restart would resume from."""
    if facts.superseded:
        return Judgement("superseded", "superseded", "a newer attempt or launch has taken over")
    if facts.mark.get("state") == "done":
        return Judgement("done", "done", "all steps done")
    what = _what_happened(facts, cluster)
    if what.verdict != "requeued":
        return what
    restarts = sum(ending.verdict == "requeued" for ending in history)
    if restarts >= cluster.max_requeues:
        return Judgement("failed", what.kind, f"{what.reason}; cluster.max_requeues ({restarts}) is used up")
    if what.kind in BLAMELESS:
        return what
    stuck = failures_without_progress(history, step)
    if stuck >= cluster.max_restarts_without_progress:
        return Judgement("failed", what.kind, f"no progress beyond step {step} in {stuck} restarts: {what.reason}")
    return what


def failures_without_progress(history: Sequence[Ending], step: int) -> int:
    """How many of the newest endings failed with the same step to resume from."""
    count = 0
    for ending in reversed(history):
        if ending.step != step:
            break
        count += ending.kind not in BLAMELESS
    return count


def bad_nodes(history: Sequence[Ending], failures: int = 2) -> list[str]:
    """Nodes on which an attempt has failed at least so many times."""
    counts = Counter(node for ending in history for node in set(ending.blamed))
    return sorted(node for node, count in counts.items() if count >= failures)


def _what_happened(facts: Facts, cluster: ClusterConfig) -> Judgement:
    if facts.cause == "CANCELLED":
        return Judgement("cancelled", "cancelled", "the job was cancelled")
    if facts.hang:
        return Judgement("requeued", "failure", facts.hang)
    asked = _asked_to_stop(facts)
    if facts.mark.get("state") == "stopped" or asked:
        kind = _kind_of_stop(facts, cluster)
        detail = facts.mark.get("reason") or asked or "asked to stop"
        return Judgement("requeued", kind, f"{kind} ({detail})" if detail not in kind else kind)
    mistakes = [failure for failure in facts.rank_failures if failure.get("user_error")]
    if mistakes:
        return Judgement("failed", "user error", str(mistakes[0]["message"]))
    if facts.cause == "NODE FAILURE":
        return Judgement("requeued", "node lost", "a node failed")
    return _failure(facts)


def _asked_to_stop(facts: Facts) -> str | None:
    """The signal by which the ranks were asked to leave, when nothing speaks of a fault of their own."""
    if facts.mark.get("state") == "failed" or facts.rank_failures:
        return None
    if facts.cause in ("PREEMPTION", "JOB REQUEUE", "TIME LIMIT"):
        return facts.cause.lower()
    first = facts.task_errors[0].what if facts.task_errors else ""
    if _ASKED.search(first):
        return first  # it came before the rank had its handlers
    return facts.signals[0] if facts.signals else None


def _kind_of_stop(facts: Facts, cluster: ClusterConfig) -> str:
    named = {"PREEMPTION": "preempted", "JOB REQUEUE": "requeued", "TIME LIMIT": "time limit"}
    if facts.cause in named:
        return named[facts.cause]
    # SLURM may send the warning up to a minute early
    near = cluster.signal_lead_seconds + 60.0
    if facts.seconds_left <= near:
        return "time limit"
    return "signal"


def _failure(facts: Facts) -> Judgement:
    failures = list(facts.rank_failures)
    killed = next((e for e in facts.task_errors if "Killed" in e.what or "signal" in e.what.lower()), None)
    if killed is not None and (not failures or facts.task_errors[0] is killed):
        reason = f"rank {killed.task} on {killed.node}: {killed.what}"
        return Judgement("requeued", "failure", reason, [killed.node])
    if failures:
        # the earliest that is not the mere echo of another rank's end
        first = next((failure for failure in failures if not failure["secondary"]), failures[0])
        reason = f"rank {first['rank']} on {first['node']}: {first['message']}"
        return Judgement("requeued", "failure", reason, [str(first["node"])])
    if facts.task_errors:
        error = facts.task_errors[0]
        return Judgement("requeued", "failure", f"rank {error.task} on {error.node}: {error.what}", [error.node])
    return Judgement("requeued", "failure", f"srun left with status {facts.exit_code} and no rank said why")
