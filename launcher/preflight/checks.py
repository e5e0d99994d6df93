"""What can be known to go wrong before a job is submitted. A login node without a GPU suffices."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig
from launcher.preflight.memory import estimate_bytes
from launcher.preflight.resources import describe
from launcher.runs.records import checkpoint_step
from launcher.slurm import client, container
from launcher.slurm.sbatch_script import Script
from mokd.config import RunConfig
from mokd.runs.files import read_json
from mokd.runs.run_directory import RunDirectory
from mokd.training.feasibility import check

# time beside the save itself: the step under way, the barrier, leaving
STOP_OVERHEAD_SECONDS = 15.0
FREE_BYTES_WARNING = 10 * 2**30


@dataclass
class Findings:
    """What is worth saying. What makes a run impossible is raised as UserError instead."""

    warnings: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def examine(config: RunConfig, cluster: ClusterConfig, root: Path, run: RunDirectory | None = None) -> Findings:
    """Checks a run against the cluster section; UserError when it cannot work."""
    findings = Findings()
    check(config, cluster.world_size, run)
    _check_output(root, findings)
    _check_paths(config, findings)
    _check_lead(config, cluster, run, findings)
    findings.warnings += container.check(cluster, container.run_paths(config, root.absolute()))
    findings.facts["job"] = describe(config, cluster)
    if cluster.gpus_per_node:
        findings.facts["memory per GPU"] = f"about {estimate_bytes(config, cluster.world_size) / 2**30:.0f} GiB"
    if cluster.gpus_per_node and cluster.ranks_per_node != cluster.gpus_per_node:
        findings.warnings.append(
            f"cluster: {cluster.ranks_per_node} ranks on {cluster.gpus_per_node} GPUs per node, not one on each"
        )
    if config.data.workers > cluster.cpus_per_task:
        findings.warnings.append(
            f"data.workers: {config.data.workers}, but cluster.cpus_per_task gives a rank {cluster.cpus_per_task} cores"
        )
    return findings


def ask_sbatch(script: Script, runs: int | None = None) -> str | None:
    """sbatch's own objection to the script, by its dry run; None when it has none, or cannot be asked."""
    if not client.available():
        return None
    command = ["sbatch", "--test-only", "--output=/dev/null", "--error=/dev/null"]
    done = subprocess.run(command, input=script.text(runs), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())


def _check_output(root: Path, findings: Findings) -> None:
    existing = root.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{root}: not writable; choose another folder with --root")
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES_WARNING:
        findings.warnings.append(f"{existing}: {free / 2**30:.1f} GiB free; checkpoints may not fit")


def _check_paths(config: RunConfig, findings: Findings) -> None:
    for path in (config.data.train, config.evaluation.train, config.evaluation.test):
        if path is not None and str(path.absolute()).startswith(("/tmp/", "/dev/shm/")):
            findings.warnings.append(f"{path}: lies on this machine alone, other nodes may not see it")


def _check_lead(config: RunConfig, cluster: ClusterConfig, run: RunDirectory | None, findings: Findings) -> None:
    measured = measured_save_seconds(run) if run else None
    if measured is None:
        return
    # a stop may come while a save in the background has just begun, and waits for it first
    needed = measured * (2 if config.checkpoint.asynchronous else 1) + STOP_OVERHEAD_SECONDS
    if needed > cluster.signal_lead_seconds:
        findings.warnings.append(
            f"cluster.signal_lead_seconds: {cluster.signal_lead_seconds}, but a save of this run took {measured:.0f}; "
            f"give it at least {needed:.0f}"
        )


def measured_save_seconds(run: RunDirectory) -> float | None:
    """How long the newest save took: the copy to host memory, and by the times of its files the rest.

    None before the first. A save at a stop is waited for, asynchronous or not.
    """
    folder = run.checkpoints / f"step-{checkpoint_step(run)}"
    state = read_json(folder / "state.json")
    if state is None:
        return None
    times = [path.stat().st_mtime for path in folder.iterdir()]
    return float(state.get("copy_seconds", 0.0)) + max(times) - min(times)
