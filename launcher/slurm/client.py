"""The few questions and orders for SLURM, by its own commands and without an accounting database."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from data_pipeline.core.errors import UserError

ENDED = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REVOKED", "TIMEOUT"),
    }
)
_UNREACHABLE = re.compile(r"unable to contact|connection refused|timed out|timeout|socket|communication", re.IGNORECASE)
_GONE = re.compile(r"invalid job id", re.IGNORECASE)


class SchedulerError(RuntimeError):
    """SLURM refused an order."""


class UnreachableError(SchedulerError):
    """The controller does not answer; asking again later may help."""


@dataclass(frozen=True)
class Job:
    """What the controller knows of a job."""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""
    excluded: str = ""
    partition: str = ""
    restarts: int = 0
    preempted: bool = False

    @property
    def ended(self) -> bool:
        """Whether the job will never run again."""
        return self.state in ENDED


def available() -> bool:
    """Whether this machine has SLURM's commands."""
    return all(shutil.which(command) for command in ("sbatch", "squeue", "scontrol", "scancel"))


def find_job(job_id: str) -> Job | None:
    """The job, None when the controller has forgotten it or never knew; UnreachableError when it does not answer."""
    try:
        text = _command("scontrol", "show", "job", "-o", job_id)
    except UnreachableError:
        raise
    except SchedulerError as error:
        if _GONE.search(str(error)):
            return None
        raise
    return _parse(job_id, text.splitlines()[0]) if text.strip() else None


def requeue(job_id: str, patience_seconds: float) -> None:
    """Puts a running job back into the queue, asking again as long as the controller is down."""
    deadline, wait = time.monotonic() + patience_seconds, 1.0
    while True:
        try:
            _command("scontrol", "requeue", job_id)
            return
        except UnreachableError:
            if time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
        wait = min(wait * 2.0, 10.0)


def exclude(job_id: str, nodes: list[str]) -> None:
    """Keeps a pending job off the given nodes."""
    _command("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def host_names(nodes: str) -> set[str]:
    """The nodes of a list as SLURM prints it, such as `n[1-2,4]`."""
    return set(_command("scontrol", "show", "hostnames", nodes).split()) if nodes else set()


def nodes_in_service(partition: str) -> set[str]:
    """The nodes of some partitions (`a,b`) that run jobs or could."""
    lines = (line.split() for line in _command("sinfo", "-hN", "-p", partition, "-o", "%N %T").splitlines())
    return {node for node, state in lines if not re.match(r"down|drain|fail|maint|unknown", state)}


def cancel(job_id: str) -> None:
    """Cancels a job; nothing happens when it has ended already."""
    try:
        _command("scancel", job_id)
    except UnreachableError as error:
        raise UserError(f"job {job_id} not cancelled: {error}") from None
    except SchedulerError as error:
        if not _GONE.search(str(error)):
            raise UserError(f"job {job_id} not cancelled: {error}") from None


def steps(job_id: str) -> list[str]:
    """The steps that srun has started in a job, by the ids with which they can be signalled.

    A task of an array is given, and answers, as `ARRAY_TASK`: its plain id can mean the whole array.
    """
    return re.findall(rf"^{re.escape(job_id)}\.\d+$", _command("squeue", "-hs", "-j", job_id, "-o", "%i"), re.MULTILINE)


def signal_step(step: str, name: str) -> None:
    """Sends a signal to every process of a job step."""
    _command("scancel", f"--signal={name}", step)


def node_address(node: str) -> str:
    """The address at which the controller itself reaches a node."""
    match = re.search(r"\bNodeAddr=(\S+)", _command("scontrol", "show", "node", "-o", node))
    return match[1] if match else node


def ask(*command: str) -> str:
    """The output of one of SLURM's commands that only ask; SchedulerError."""
    return _command(*command)


def _parse(job_id: str, line: str) -> Job:
    def field(name: str) -> str:
        match = re.search(rf"(?:^| ){name}=(\S*)", line)
        value = match[1] if match else ""
        return "" if value in ("(null)", "None", "Unknown") else value

    return Job(
        job_id=job_id,
        state=field("JobState").split("+")[0],
        reason=field("Reason"),
        nodes=field("NodeList"),
        excluded=field("ExcNodeList"),
        partition=field("Partition"),
        restarts=int(field("Restarts") or 0),
        preempted=bool(field("PreemptTime")),
    )


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Programs started meanwhile do not get the signals that SLURM sends to every process of a job which it ends.

    A requeue ends the very job that asks for it; what else is to be said about that job must still be said. The signals
    reach this process afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _command(*command: str) -> str:
    try:
        with _signals_held_back():
            done = subprocess.run(command, capture_output=True, text=True, timeout=30.0, check=False)
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]}: not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"{command[0]}: no answer from the SLURM controller within 30 s") from None
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split()) or f"{command[0]}: status {done.returncode}"
        raise (UnreachableError if _UNREACHABLE.search(message) else SchedulerError)(message)
    return done.stdout
