"""Whether the ranks of an attempt hang: each phase of a rank has a limit for how long it may go without progress."""

from __future__ import annotations

import time
from typing import Any

from launcher.config import ClusterConfig
from mokd.runs.heartbeat import read_heartbeats, slowest
from mokd.runs.run_directory import RunDirectory


def limit_seconds(phase: str, cluster: ClusterConfig) -> int:
    """How long a rank may be without progress in a phase."""
    limits = {
        "start": cluster.startup_timeout_seconds,
        "compile": cluster.compile_timeout_seconds,
        "evaluate": cluster.evaluate_timeout_seconds,
        "save": cluster.save_timeout_seconds,
    }
    return limits.get(phase, cluster.hang_timeout_seconds)


class HangWatch:
    """Reads the heartbeats of an attempt again and again; a rank that has left none yet counts as starting."""

    def __init__(self, run: RunDirectory, attempt: int, cluster: ClusterConfig) -> None:
        self._run, self._attempt, self._cluster = run, attempt, cluster
        self._began = time.monotonic()
        # by rank, and by this process's clock: what was last seen, when that was new, when its phase was
        self._seen: dict[int, tuple[tuple[Any, ...], float, float]] = {}

    def hung(self) -> str | None:
        """Which rank is stuck in what, or None."""
        now = time.monotonic()
        records = read_heartbeats(self._run, self._attempt)
        # a rank that has saved waits in its next step for one that still saves: the longest limit is everybody's
        limit = max((limit_seconds(record["phase"], self._cluster) for record in records), default=0)
        idle = [self._idle(record, now) for record in records]
        if max(idle, default=0) > limit:
            record = slowest(records)  # all wait for the one that is furthest behind
            who = f"rank {record['rank']} on {record['host']}"
            return f"hang: {who} without progress for {limit} s in phase {record['phase']}, step {record['step']}"
        limit, missing = self._cluster.startup_timeout_seconds, self._cluster.world_size - len(records)
        if missing and now - self._began > limit:
            return f"hang: {missing} ranks without a sign of life {limit} s after the start"
        return None

    def _idle(self, record: dict[str, Any], now: float) -> float:
        """For how long a rank has not got on; a start is timed as a whole, however often something happens in it."""
        rank, mark = record["rank"], (record["phase"], record["step"], record["beat"])
        if rank not in self._seen:
            self._seen[rank] = (mark, now, self._began)
        before, progressed, entered = self._seen[rank]
        if before != mark:
            progressed, entered = now, entered if before[0] == mark[0] else now
            self._seen[rank] = (mark, progressed, entered)
        return now - (entered if record["phase"] == "start" else progressed)
