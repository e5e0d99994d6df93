"""What to do after an attempt has ended: a pure function of what is known about the end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.config import ClusterConfig
from launcher.runs.records import Ending, Verdict
from mokd.runs.exit_codes import EXIT_STOPPED, EXIT_SUPERSEDED

# endings of these kinds are nobody's fault: they never count as failures
BLAMELESS = frozenset({"signal", "preempted", "time limit", "requeued", "node lost", "lost"})
_NAMED = {"PREEMPTION": "preempted", "JOB REQUEUE": "requeued", "TIME LIMIT": "time limit"}
# srun's words for a task that ended because it was asked to; a rank that was asked while starting up exits
_ASKED = re.compile(rf"Terminated|User defined signal|Interrupt|exit code {EXIT_STOPPED}$")
_SUPERSEDED = re.compile(rf"exit code {EXIT_SUPERSEDED}$")
_EXITED = re.compile(r"Exited with exit code")


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
class Decision:
    """What happened and what follows."""

    verdict: Verdict
    kind: str
    reason: str
    blamed: list[str] = field(default_factory=list)


def decide(facts: Facts, history: Sequence[Ending], step: int, cluster: ClusterConfig) -> Decision:
    """The consequence of an attempt's end. `step` is what a restart would resume from."""
    # a rank may see the newer attempt before this process does
    if facts.superseded or any(_SUPERSEDED.search(error.what) for error in facts.task_errors):
        return Decision("superseded", "superseded", "a newer attempt or launch has taken over")
    if facts.mark.get("state") == "done":
        return Decision("done", "done", "all steps done")
    what = _what_happened(facts, cluster)
    if what.verdict != "requeued":
        return what
    restarts = sum(ending.verdict == "requeued" for ending in history)
    if restarts >= cluster.max_requeues:
        return Decision("failed", what.kind, f"{what.reason}; cluster.max_requeues ({restarts}) is used up")
    if what.kind in BLAMELESS:
        return what
    stuck = failures_without_progress(history, step)
    if stuck >= cluster.max_restarts_without_progress:
        return Decision("failed", what.kind, f"no progress beyond step {step} in {stuck} restarts: {what.reason}")
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
    """Nodes on which an attempt has failed at least so many times, the worst first."""
    counts = Counter(node for ending in history for node in set(ending.blamed))
    return sorted((node for node, count in counts.items() if count >= failures), key=lambda node: (-counts[node], node))


def exclusions(history: Sequence[Ending], already: set[str], in_service: set[str], needed: int) -> list[str]:
    """Where the next attempt must not run: where it must not already, and on bad nodes while enough others remain.

    A job that waits for ever for a node it will not take is worse off than one on a node that has failed before.
    """
    excluded = set(already)
    for node in bad_nodes(history):
        if len(in_service - excluded - {node}) >= needed:
            excluded.add(node)
    return sorted(excluded)


def _what_happened(facts: Facts, cluster: ClusterConfig) -> Decision:
    if facts.cause == "CANCELLED":
        return Decision("cancelled", "cancelled", "the job was cancelled")
    final = next((failure for failure in facts.rank_failures if failure.get("final")), None)
    if final:
        # a resumed run is deterministic: it would fail there again, on any node
        return Decision("failed", "failed", f"rank {final['rank']}: {final['message']}")
    if facts.hang:
        return Decision("requeued", "failure", facts.hang)
    if facts.cause in _NAMED:
        return _stop(facts, cluster)
    if facts.cause == "NODE FAILURE":
        return Decision("requeued", "node lost", "a node failed")
    mistakes = [failure for failure in facts.rank_failures if failure["user_error"]]
    if mistakes:
        return Decision("failed", "user error", str(mistakes[0]["message"]))
    # a rank's own fault comes before a stop: the others are asked to stop because of it
    return _failure(facts) or _stop(facts, cluster)


def _stop(facts: Facts, cluster: ClusterConfig) -> Decision:
    first = facts.task_errors[0].what if facts.task_errors else ""
    asked = facts.mark.get("reason") if facts.mark.get("state") == "stopped" else None
    # a rank without handlers yet dies of the signal that asks it to leave
    asked = asked or (facts.signals[0] if facts.signals else None) or (first if _ASKED.search(first) else None)
    if asked is None and facts.cause is None:
        reason = f"srun left with status {facts.exit_code} and no rank said why"
        return Decision("requeued", "failure", reason)
    kind = _kind_of_stop(facts, cluster)
    return Decision("requeued", kind, f"{kind} ({asked})" if asked else kind)


def _kind_of_stop(facts: Facts, cluster: ClusterConfig) -> str:
    if facts.cause in _NAMED:
        return _NAMED[facts.cause]
    # SLURM may send the warning up to a minute early
    return "time limit" if facts.seconds_left <= cluster.signal_lead_seconds + 60.0 else "signal"


def _failure(facts: Facts) -> Decision | None:
    """The fault of a rank, if there was one, with the node where it happened."""
    first = facts.task_errors[0] if facts.task_errors else None
    own = next((failure for failure in facts.rank_failures if not failure["secondary"]), None)
    killed = first is not None and not _EXITED.search(first.what) and not _ASKED.search(first.what)
    if own is None and not killed and facts.rank_failures:
        own = facts.rank_failures[0]
    if own is not None and not killed:
        reason = f"rank {own['rank']} on {own['node']}: {own['message']}"
        return Decision("requeued", "failure", reason, [str(own["node"])])
    if first is None or _ASKED.search(first.what):
        return None
    return Decision("requeued", "failure", f"rank {first.task} on {first.node}: {first.what}", [first.node])
