"""From a checked configuration to a job: run directory, snapshot of the code, submission."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig, minutes
from launcher.runs import code_snapshot
from launcher.runs.permissions import make_private
from launcher.runs.records import Launch, Records
from launcher.slurm import client
from launcher.slurm.rank_entry import ENTRY, run_rank
from launcher.slurm.sbatch_script import Script, SupervisedExecutor
from launcher.slurm.status import current_job
from mokd.config import RunConfig, with_absolute_paths
from mokd.distributed.free_port import free_port
from mokd.runs.files import replace_text
from mokd.runs.processes import process_start
from mokd.runs.run_directory import RunDirectory

LEAVING_SECONDS = 120.0
NO_SLURM = "SLURM's commands are not on this machine; run the job right here with --local, or log in to the cluster"


@dataclass(frozen=True)
class Submitted:
    """A run and the job that works on it."""

    run: RunDirectory
    job_id: str


def create_run(config: RunConfig, root: Path) -> RunDirectory:
    """A new, private run directory for `config` below `root`, with its first weights in it."""
    from mokd.weights import initial  # torch is imported only after the cheap checks

    path = runnable_path(root / config.name)
    if (path / "config.yaml").exists():
        raise UserError(
            f"{path}: this run exists already; continue it with: mokd resume {path}, or set another name=..."
        )
    make_private(path)
    return initial.create_run(path, with_absolute_paths(config))


@contextmanager
def taken_back(*folders: Path) -> Generator[None]:
    """Removes the folders that were not there before, when the submission within the context is refused: the corrected
    command shall not find them.
    """
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except UserError:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def runnable_path(path: Path) -> Path:
    """The absolute path, if SLURM can write its logs there: it gives `%` and a backslash a meaning of their own."""
    path = path.absolute()
    if any(c in str(path) for c in "%\\") or not str(path).isprintable():
        raise UserError(f"{str(path)!r}: a run directory's path must not hold '%', '\\' or control characters")
    return path


def submit(run: RunDirectory, cluster: ClusterConfig, *, new_code: bool = True, entry: str = ENTRY) -> Submitted:
    """Submits a run to SLURM; UserError when a job of it is still there, or when sbatch refuses."""
    if not client.available():
        raise UserError(NO_SLURM)
    code = _prepare(run, new_code)
    records = Records(run)
    launch = records.new_launch("slurm", cluster.model_dump(mode="json"), run.jobs)
    script = run_script(run, cluster, launch.number)
    try:
        job = SupervisedExecutor(script).submit(run_rank, str(run.path), entry)
    except (UserError, OSError):
        records.drop_launch(launch)
        raise
    records.write_launch(replace(launch, job_id=job.job_id, code=code))
    return Submitted(run, job.job_id)


def run_script(run: RunDirectory, cluster: ClusterConfig, launch: int) -> Script:
    """The batch script of one run."""
    path = runnable_path(run.path)
    return Script(cluster, f"mokd {path.name}", path / "jobs", path / "code", ["--launch", str(launch), str(path)])


def submit_array(
    runs: Sequence[RunDirectory], folder: Path, cluster: ClusterConfig, name: str, entry: str = ENTRY
) -> list[Submitted]:
    """Submits the runs of a sweep as one job array, whose files lie in `folder`."""
    if not client.available():
        raise UserError(NO_SLURM)
    folder = runnable_path(folder)
    make_private(folder)
    code = code_snapshot.take(folder / "code")
    jobs = folder / "jobs"
    make_private(jobs)
    replace_text(folder / "runs.txt", "".join(f"{run.path}\n" for run in runs), durable=True)
    launches = [Records(run).new_launch("slurm", cluster.model_dump(mode="json"), jobs) for run in runs]
    executor = SupervisedExecutor(array_script(folder, cluster, name))
    try:
        with executor.batch():
            submitted = [executor.submit(run_rank, str(run.path), entry) for run in runs]
    except (UserError, OSError):
        for run, launch in zip(runs, launches, strict=True):
            Records(run).drop_launch(launch)
        raise
    for run, launch, job in zip(runs, launches, submitted, strict=True):
        Records(run).write_launch(replace(launch, job_id=job.job_id, code=code))
    return [Submitted(run, job.job_id) for run, job in zip(runs, submitted, strict=True)]


def array_script(folder: Path, cluster: ClusterConfig, name: str) -> Script:
    """The batch script of a sweep; every run of it is new, so this is launch 1 of each."""
    supervised = ["--launch", "1", "--runs", str(folder / "runs.txt")]
    return Script(cluster, f"mokd {name}", folder / "jobs", folder / "code", supervised)


def submit_local(run: RunDirectory, cluster: ClusterConfig, *, new_code: bool = True, entry: str = ENTRY) -> Submitted:
    """Runs the same job on this machine through submitit's local executor, all its ranks in one place."""
    code = _prepare(run, new_code)
    records = Records(run)
    launch = records.new_launch("local", cluster.model_dump(mode="json"), run.jobs)
    attempt = run.claim_attempt({"launch": launch.number, "job_id": None, "nodes": socket.gethostname()})
    os.environ.update(
        cluster.environment
        | {
            "MOKD_ATTEMPT": str(attempt),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONSAFEPATH": "1",
        }
        | {"PYTHONPATH": os.pathsep.join([str(run.path / "code"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    )
    executor = submitit.LocalExecutor(run.jobs)
    executor.update_parameters(
        nodes=1,
        tasks_per_node=cluster.world_size,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=minutes(cluster.time),
        signal_delay_s=cluster.signal_lead_seconds,
        setup=list(cluster.setup),
    )
    run.write_status("starting", attempt, nodes=socket.gethostname())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited: the job outlives the terminal
    job: Any = executor.submit(run_rank, str(run.path), entry)
    started = process_start(int(job.job_id))
    records.write_launch(replace(launch, job_id=job.job_id, process_start=started, code=code))
    return Submitted(run, job.job_id)


def cancel(run: RunDirectory) -> str:
    """Cancels the run's job; the ranks still save. Returns the job's id."""
    launch = Records(run).last_launch()
    if launch is None or current_job(launch) is None:
        raise UserError(f"{run.path}: no job of this run is queued or running")
    assert launch.job_id is not None
    # on record first: the supervisor must not take the end for a fault and requeue
    Records(run).write_launch(replace(launch, cancelled=time.time()))
    if launch.kind == "local":
        os.kill(int(launch.job_id), signal.SIGTERM)
    else:
        client.cancel(launch.job_id)
    return launch.job_id


def _prepare(run: RunDirectory, new_code: bool) -> str:
    make_private(run.path)
    make_private(run.jobs)
    wait_for_the_last(run)
    code = run.path / "code"
    return code_snapshot.take(code) if new_code or not code.is_dir() else code_snapshot.digest(code)


def wait_for_the_last(run: RunDirectory) -> None:
    """UserError while a job of the run is at work; one that was cancelled is given the time to save and leave."""
    last: Launch | None = Records(run).last_launch()
    deadline = time.monotonic() + LEAVING_SECONDS
    while last is not None and current_job(last) is not None:
        if last.cancelled is None or time.monotonic() > deadline:
            raise UserError(f"{run.path}: job {last.job_id} is still at work on it; to end it: mokd cancel {run.path}")
        time.sleep(0.5)


def describe_local(cluster: ClusterConfig, run: Path) -> str:
    """What `--local --dry-run` shows."""
    command = [sys.executable, "-u", "-m", "submitit.core._submit", str(run / "jobs")]
    return f"{cluster.world_size} processes on {socket.gethostname()}: {json.dumps(command)}"
