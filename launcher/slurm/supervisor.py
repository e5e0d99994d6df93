"""The batch script's only command: run one attempt of a run, judge how it ended, requeue or not.

    python -m launcher.slurm.supervisor --launch N RUN -- srun ... python -m submitit.core._submit FOLDER

It lives in the batch step, outside the ranks: no death, hang or signal storm among them keeps it from deciding, and it
decides when the last rank has left, so that a requeue takes nobody's grace time. Exit status: one of
`mokd.runs.exit_codes.DECIDED`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig, minutes
from launcher.runs.goodput import steps_done
from launcher.runs.permissions import require_private
from launcher.runs.records import Ending, Records, checkpoint_step
from launcher.slurm import client
from launcher.slurm.container import HOST_PATH
from launcher.slurm.hang_watch import HangWatch
from launcher.slurm.requeue_policy import Decision, Facts, bad_nodes, decide, exclusions
from launcher.slurm.srun_step import Step
from mokd.distributed.free_port import free_port
from mokd.runs.exit_codes import EXIT_DONE, EXIT_GAVE_UP, EXIT_USER
from mokd.runs.run_directory import RunDirectory

REQUEUE_PATIENCE_SECONDS = 3600.0
# pauses before a run directory that takes no files (full disk, quota, file server away) is asked again at the start
PAUSES_SECONDS = (1.0, 4.0, 15.0, 40.0, 60.0)
LISTEN_SECONDS = 0.2  # between two looks for signals in such a pause
T = TypeVar("T")
_LISTENED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Supervisor:
    """One attempt at one run, as submitted by launch number `launch`."""

    def __init__(self, run: RunDirectory, launch: int):
        self.run, self.records = run, Records(run)
        self.number = launch
        found = [record for record in self.records.launches() if record.number == launch]
        if not found:
            raise UserError(f"{run.path}: launch {launch} is not on record; launch the run again")
        self.cluster = schema.validate(ClusterConfig, found[0].cluster, f"{run.path}: launch {launch}")
        self.job_id = job_id()
        self.signals: list[str] = [name for name in [os.environ.get("MOKD_SIGNALLED")] if name]
        self.attempt = 0
        self.started = time.time()

    def listen(self) -> None:
        """From now on signals are only noted: the ranks get their own, and this process must outlive them."""
        for number in _LISTENED:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number).name)

    def supervise(self, command: Sequence[str]) -> int:
        """Runs the attempt and acts on its end; returns the batch script's exit status."""
        if self.run.read_status().get("state") == "done":
            _say("this run is done already")
            return EXIT_DONE
        if self._superseded():
            _say("a newer launch of this run has taken over")
            return EXIT_DONE
        nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        facts: dict[str, Any] = {
            "launch": self.number,
            "job_id": self.job_id,
            "nodes": nodes,
            "restart": _restart_count(),
            "step": checkpoint_step(self.run),
        }
        try:
            self._patiently(self._account_for_the_lost)
            self.attempt = self._patiently(lambda: self.run.claim_attempt(facts))
            self._patiently(lambda: self.run.write_status("starting", self.attempt, step=facts["step"], nodes=nodes))
        except OSError as error:
            if not self.signals:
                raise
            _say(str(error))  # the job's end comes first; what it runs next may find a disk with room
        if self.signals:
            cause, left = self._cause(node_lost=False), self._seconds_left()
            return self._conclude(Facts(0, cause=cause, signals=self.signals, seconds_left=left))
        self._clear_submitit_leftovers(command)
        step = Step(command, self._environment(), self.job_id, self.cluster)
        code = step.run(HangWatch(self.run, self.attempt, self.cluster), self._superseded)
        mark = self.run.read_status()
        return self._conclude(
            Facts(
                exit_code=code,
                mark=mark if mark.get("attempt") == self.attempt else {},
                cause=self._cause(step.node_lost),
                task_errors=step.task_errors,
                rank_failures=self.records.rank_failures(self.attempt),
                signals=self.signals,
                hang=step.hang,
                seconds_left=self._seconds_left(),
                superseded=self._superseded(),
            )
        )

    def _conclude(self, facts: Facts) -> int:
        history, step = self.records.endings(), checkpoint_step(self.run)
        decision = decide(facts, history, step, self.cluster)
        _say(f"attempt {self.attempt}: {decision.verdict}: {decision.reason}")
        if decision.verdict == "superseded":
            return EXIT_DONE
        ending = self._ending(decision, step)
        # an end that cannot be recorded is followed all the same; the next attempt accounts for it
        with _said_only("how the attempt ended"):
            if self.attempt:  # else it was asked to leave while the disk was full, before it had a number
                self.records.write_ending(ending)
        if decision.verdict == "requeued":
            return self._requeue([*history, ending])
        if decision.verdict == "failed":
            with _said_only("that the run has failed"):
                self.run.write_status("failed", self.attempt, reason=decision.reason, step=step)
            return EXIT_USER if decision.kind == "user error" else EXIT_GAVE_UP
        return EXIT_DONE

    def _requeue(self, history: Sequence[Ending]) -> int:
        already = self._job()
        if not (already and already.restarts > _restart_count()):  # else SLURM has done so itself
            client.requeue(self.job_id, REQUEUE_PATIENCE_SECONDS)
        # the controller may have been away before the order and be back since
        if (bad := bad_nodes(history)) and (job := already or self._job()):
            kept = client.host_names(job.excluded)
            nodes = exclusions(history, kept, client.nodes_in_service(job.partition), self.cluster.nodes)
            if spared := sorted({*bad} - {*nodes}):
                _say(f"{', '.join(spared)}: bad, but too few other nodes are in service to stay away")
            if {*nodes} - kept:
                # only a pending job can be told where not to run; SLURM now waits for this process to leave
                _say(f"staying away from {', '.join(nodes)}")
                client.exclude(self.job_id, nodes)
        return EXIT_DONE

    def _ending(self, decision: Decision, step: int) -> Ending:
        return Ending(
            attempt=self.attempt,
            launch=self.number,
            verdict=decision.verdict,
            kind=decision.kind,
            reason=decision.reason,
            step=step,
            job_id=self.job_id,
            nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
            blamed=decision.blamed,
            started=self.started,
            ended=time.time(),
            first_step=int(self.records.attempt_facts(self.attempt).get("step", 0)),
            last_step=steps_done(self.run, self.attempt),
        )

    def _patiently(self, act: Callable[[], T]) -> T:
        """What `act` returns, asked again with pauses while it raises OSErrors; at last, or at a signal, that error."""
        for pause in PAUSES_SECONDS:
            try:
                return act()
            except OSError as error:
                if self.signals:
                    raise
                _say(f"{error}; trying again in {pause:.0f} s")
            # in short sleeps, which a signal does not end by itself: the grace time may be shorter than a pause
            until = time.monotonic() + pause
            while not self.signals and (left := until - time.monotonic()) > 0.0:
                time.sleep(min(left, LISTEN_SECONDS))
        return act()

    def _account_for_the_lost(self) -> None:
        """Attempts whose supervisor went down with its node have left no ending; note what is known."""
        known = {ending.attempt for ending in self.records.endings()}
        status = self.run.read_status()
        for attempt in range(1, self.run.current_attempt() + 1):
            if attempt in known:
                continue
            facts = self.records.attempt_facts(attempt)
            if "launch" not in facts:
                continue  # trained without the launcher
            stopped = status.get("attempt") == attempt and status.get("state") == "stopped"
            reason = (
                f"stopped ({status.get('reason')})" if stopped else "lost: its node failed, or the job was requeued"
            )
            ending = Ending(
                attempt, facts["launch"], "requeued", "lost", reason, checkpoint_step(self.run), facts["job_id"],
                facts["nodes"], [], facts["time"], self._last_sign(attempt), facts.get("step", 0),
                steps_done(self.run, attempt),
            )  # fmt: skip
            self.records.write_ending(ending)

    def _last_sign(self, attempt: int) -> float:
        """When an attempt that left no ending was last heard of."""
        status = self.run.read_status()
        return float(
            status["time"] if status.get("attempt") == attempt else self.records.attempt_facts(attempt)["time"]
        )

    def _superseded(self) -> bool:
        newest = self.records.last_launch()
        if newest is not None and newest.number != self.number:
            return True
        return bool(self.attempt) and self.run.current_attempt() != self.attempt

    def _cause(self, node_lost: bool) -> str | None:
        """Why SLURM ends this job, when it does."""
        newest, job = self.records.last_launch(), self._job()
        if newest is not None and newest.cancelled:
            return "CANCELLED"
        if node_lost:
            return "NODE FAILURE"
        if job is None:
            return None
        if job.preempted:
            return "PREEMPTION"
        if job.restarts > _restart_count():
            return "JOB REQUEUE"
        if job.state == "TIMEOUT" or (job.state == "COMPLETING" and self._seconds_left() <= 0.0):
            return "TIME LIMIT"
        # ended for good, and this process is among the last to go
        return "CANCELLED" if job.state in ("CANCELLED", "COMPLETING") else None

    def _job(self) -> client.Job | None:
        try:
            return client.find_job(self.job_id)
        except client.SchedulerError as error:
            _say(f"{error}")
            return None

    def _seconds_left(self) -> float:
        # not SLURM's EndTime: a preemption moves that to the end of the grace time
        return 60.0 * minutes(self.cluster.time) - (time.time() - self.started)

    def _environment(self) -> dict[str, str]:
        """The ranks' environment: who meets where, and as which attempt."""
        node = os.environ.get("SLURMD_NODENAME", "")
        try:
            address = client.node_address(node)
        except client.SchedulerError:
            address = socket.gethostname()
        return {
            **os.environ,
            "PATH": os.pathsep.join(filter(None, [os.environ.get(HOST_PATH), os.environ.get("PATH")])),
            "MOKD_ATTEMPT": str(self.attempt),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(free_port("")),  # a new one for every attempt: no leftover can join
        }

    def _clear_submitit_leftovers(self, command: Sequence[str]) -> None:
        # submitit refuses to write a result beside a temporary file that a killed attempt left
        for path in Path(command[-1]).glob(f"{self.job_id}_*.save_tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def _said_only(what: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        _say(f"cannot record {what}: {error}")


def _say(text: str, who: str = "supervisor") -> None:
    with suppress(OSError):  # the log lies in the run directory, whose disk may be full
        print(f"{who}: {text}", file=sys.stderr, flush=True)


def job_id() -> str:
    """This job's id as SLURM's commands take it; the plain number of an array's task can mean the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def _restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))  # unset on a job's first run


def main(arguments: Sequence[str]) -> int:
    """The command line of the batch script."""
    cut = list(arguments).index("--")
    own, command = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m launcher.slurm.supervisor")
    parser.add_argument("--launch", type=int, required=True)
    parser.add_argument("--runs", type=Path, help="a file with one run directory per task of a job array")
    parser.add_argument("run", type=Path, nargs="?")
    given = parser.parse_args(own)
    path = given.run or _run_of_task(given.runs)
    try:
        require_private(path)
        supervisor = Supervisor(RunDirectory.open(path), given.launch)
        supervisor.listen()
        return supervisor.supervise(command)
    except UserError as error:
        _say(str(error), "error")
        return EXIT_USER
    except OSError as error:
        # the next start would most likely meet the same, and nothing could count how often
        _say(f"{error}; not requeued: once files can be written there, mokd resume {path}", "error")
        return EXIT_GAVE_UP


def _run_of_task(runs: Path) -> Path:
    return Path(runs.read_text(encoding="utf-8").splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
