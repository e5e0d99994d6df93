"""What a run is doing, from the scheduler while it remembers and from the run's own marks always."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.runs.records import Ending, Launch, Records, checkpoint_step
from launcher.slurm import client
from mokd.runs.files import read_json
from mokd.runs.heartbeat import read_heartbeats, slowest
from mokd.runs.metrics import read_metrics
from mokd.runs.processes import process_start
from mokd.runs.run_directory import RunDirectory

# states that a run does not leave without a new launch
FINAL = frozenset({"done", "failed", "cancelled", "stopped", "lost"})


@dataclass(frozen=True)
class RunStatus:
    """Everything `mokd status` shows of a run."""

    run: str
    state: str
    attempt: int
    restarts: list[dict[str, Any]]
    step: int
    epoch: int
    checkpoint_step: int
    nodes: str
    reason: str = ""
    job_id: str | None = None
    total_steps: int | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint_age_seconds: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    alarms_now: int = 0  # those whose sign was there at the newest logged step
    phase: str | None = None
    phase_seconds: float | None = None
    slowest_rank: dict[str, Any] | None = None


def read_status(run: RunDirectory) -> RunStatus:
    """The state of a run now; of its own marks alone where the scheduler does not answer, which `reason` tells."""
    records, mark = Records(run), run.read_status()
    launch, endings = records.last_launch(), records.endings()
    job = None
    try:
        job = current_job(launch) if launch else None
        state, reason = _state(run, launch, job, endings, mark)
    except client.SchedulerError as error:
        state, reason = _by_itself(run, endings, mark)
        reason = "; ".join(filter(None, (reason, f"{error}; this is what the run's own files say")))
    last = _last_metrics(run.metrics_file)
    step, total = max(int(mark.get("step", 0)), checkpoint_step(run)), mark.get("total_steps")
    hearts = [] if state in FINAL else read_heartbeats(run, run.current_attempt())
    behind = slowest(hearts) if hearts else None
    return RunStatus(
        run=str(run.path),
        state=state,
        attempt=run.current_attempt(),
        restarts=[_restart(ending) for ending in endings if ending.verdict == "requeued"],
        step=step,
        epoch=int(mark.get("epoch", last.get("epoch", 0))),
        checkpoint_step=checkpoint_step(run),
        nodes=(job.nodes if job else "") or ("" if state in FINAL else str(mark.get("nodes", ""))),
        reason=reason,
        job_id=launch.job_id if launch else None,
        total_steps=total,
        images_per_second=last.get("images_per_second") if state == "running" else None,
        eta_seconds=_eta(last, step, total) if state == "running" else None,
        checkpoint_age_seconds=_checkpoint_age(run),
        losses={
            key.split("/")[1]: value for key, value in last.items() if key.endswith("/total") and value is not None
        },
        changes=read_metrics(run.changes_file),
        alarms=read_metrics(run.alarms_file),
        alarms_now=int(last.get("alarms") or 0),
        phase=hearts[0]["phase"] if hearts else None,
        phase_seconds=time.time() - hearts[0]["since"] if hearts else None,
        slowest_rank=behind and {**behind, "seconds_without_progress": time.time() - behind["progressed"]},
    )


def current_job(launch: Launch) -> client.Job | None:
    """The launch's job while it is queued or runs; None when it has ended or is forgotten."""
    if launch.job_id is None:
        # between registering and sbatch's answer, or the launching process died there
        return client.Job("", "SUBMITTING") if time.time() - launch.submitted < 60.0 else None
    if launch.kind == "local":
        alive = launch.host != socket.gethostname() or process_start(int(launch.job_id)) == launch.process_start
        return client.Job(launch.job_id, "RUNNING", nodes=launch.host) if alive and launch.process_start else None
    job = client.find_job(launch.job_id) if client.available() else None
    return None if job is None or job.ended else job


def _state(
    run: RunDirectory, launch: Launch | None, job: client.Job | None, endings: list[Ending], mark: dict[str, Any]
) -> tuple[str, str]:
    own = str(mark.get("state", "created"))
    if own == "done":
        return "done", ""
    if launch is None:
        return own, str(mark.get("reason", ""))
    last = endings[-1] if endings and endings[-1].launch == launch.number else None
    ended = last is not None and last.attempt == run.current_attempt()
    if launch.cancelled and (job is None or job.state == "COMPLETING"):
        return "cancelled", "by mokd cancel"
    if job is not None and not (ended and last and last.verdict in FINAL):
        if job.state not in ("RUNNING", "COMPLETING", "SUSPENDED"):
            return "pending", job.reason
        fresh = run.current_attempt() > 0 and _launch_of_newest_attempt(run) == launch.number
        if job.state == "RUNNING" and fresh and not ended:
            # one rank's failure is not the run's: the supervisor has yet to decide
            return ("running" if own in ("running", "failed", "stopped") else "starting"), ""
        return ("requeued" if ended else "starting"), (last.reason if ended and last else "")
    if ended and last is not None and last.verdict in FINAL:
        return last.verdict, last.reason
    if launch.kind == "local":
        return (own, str(mark.get("reason", ""))) if own in FINAL else ("lost", "its processes are gone")
    return _after_the_job(run, launch, mark)


def _by_itself(run: RunDirectory, endings: list[Ending], mark: dict[str, Any]) -> tuple[str, str]:
    """State and reason as the supervisor, or else the ranks, have left them."""
    last = endings[-1] if endings and endings[-1].attempt == run.current_attempt() else None
    if last is not None and last.verdict in FINAL:
        return last.verdict, last.reason
    return str(mark.get("state", "created")), str(mark.get("reason", ""))


def _after_the_job(run: RunDirectory, launch: Launch, mark: dict[str, Any]) -> tuple[str, str]:
    """The state of a run whose job is over although no supervisor has said so."""
    state = launch.final_state
    if state is None and launch.job_id is not None and client.available():
        job = client.find_job(launch.job_id)
        if job is not None and job.ended:
            state = job.state
            # on record while the scheduler still remembers
            Records(run).write_launch(replace(launch, final_state=state))
    if state == "CANCELLED":
        return "cancelled", "by scancel"
    if state is not None:
        return "failed", f"SLURM ended the job: {state}"
    if _launch_of_newest_attempt(run) != launch.number:
        return "cancelled", "the job left the queue before it started"
    return "lost", f"the job is gone; last sign of life at step {mark.get('step', 0)}"


def _launch_of_newest_attempt(run: RunDirectory) -> int:
    """The launch that the newest attempt belongs to, 0 for none."""
    return int(Records(run).attempt_facts(run.current_attempt()).get("launch", 0))


def _restart(ending: Ending) -> dict[str, Any]:
    return {"reason": ending.reason, "step": ending.step, "kind": ending.kind, "nodes": ending.nodes}


def _last_metrics(path: Path) -> dict[str, Any]:
    """The newest record with a speed, from the end of a file that may be long."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 65536))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "images_per_second" in record:
            return record
    return {}


def _eta(last: dict[str, Any], step: int, total: int | None) -> float | None:
    speed, seen = last.get("images_per_second"), last.get("images_seen")
    if not (speed and seen and total and last.get("step")):
        return None
    return float(total - step) * (seen / last["step"]) / speed


def _checkpoint_age(run: RunDirectory) -> float | None:
    try:
        return time.time() - (run.checkpoints / f"step-{checkpoint_step(run)}").stat().st_mtime
    except OSError:
        return None


def find_runs(root: Path) -> list[RunDirectory]:
    """All runs below `root`, newest activity last."""
    found = [RunDirectory(path.parent) for path in root.glob("*/config.yaml")]
    return sorted(found, key=lambda run: float((read_json(run.path / "status.json") or {}).get("time", 0.0)))
