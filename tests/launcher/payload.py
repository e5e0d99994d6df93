"""A stand-in for training that keeps the trainer's promises towards the launcher and costs nothing.

It counts steps, publishes "checkpoints", leaves the marks that the trainer leaves, and stops when asked. A file
`payload.json` in the run directory says how long it runs and what goes wrong.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import launcher.slurm.rank_entry
from data_pipeline.core.errors import UserError
from launcher.runs.records import checkpoint_step
from mokd.runs.heartbeat import Heartbeat
from mokd.runs.run_directory import RunDirectory


class FinalError(RuntimeError):
    final = True


def run(directory: Path, stop):
    directory_, plan = RunDirectory(directory), json.loads((directory / "payload.json").read_text())
    attempt, rank = int(os.environ["MOKD_ATTEMPT"]), int(os.environ["RANK"])
    (directory / "where.json").write_text(json.dumps(launcher.slurm.rank_entry.__file__))
    heartbeat = Heartbeat(directory_, attempt, rank)
    started = step = checkpoint_step(directory_)
    if step and rank == 0:
        print(f"resumed at step {step} of {plan['steps']}", file=sys.stderr, flush=True)
    if plan.get("final_error"):
        raise FinalError(plan["final_error"])
    if plan.get("user_error"):
        raise UserError(plan["user_error"])
    if os.environ.get("SLURMD_NODENAME") == plan.get("bad_node"):
        raise RuntimeError("this node's memory is broken")
    while step < plan["steps"] and not stop.reason:
        time.sleep(plan.get("step_seconds", 0.05))
        step += 1
        if step == plan.get("fail_at"):
            raise RuntimeError(f"batch {step} is poisoned")
        while rank == 0 and (directory / "hold").exists():
            time.sleep(0.05)
        heartbeat.phase("step", step)
        if rank == 0:
            print(f"step {step}/{plan['steps']}", file=sys.stderr, flush=True)
            directory_.write_status("running", attempt, step=step, total_steps=plan["steps"], epoch=0)
            if step % plan.get("every", 10) == 0:
                publish(directory_, step)
    state = "done" if step >= plan["steps"] else "stopped"
    if rank == 0:
        if step > started:
            publish(directory_, step)
        reason = stop.reason or ""
        directory_.write_status(state, attempt, step=step, reason=reason)
    else:
        time.sleep(plan.get("straggle_seconds", 0.0))
    return SimpleNamespace(state=state, step=step)


def publish(directory: RunDirectory, step: int) -> None:
    (directory.checkpoints / f"step-{step}").mkdir(parents=True, exist_ok=True)
