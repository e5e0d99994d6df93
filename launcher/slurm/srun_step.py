"""The ranks of one attempt, seen from the batch script: run them, listen to srun, end them when they hang."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from launcher.config import ClusterConfig
from launcher.slurm import client
from launcher.slurm.hang_watch import HangWatch
from launcher.slurm.requeue_policy import TaskError

_TASKS = re.compile(r"srun: error: (?P<node>[^:\s]+): tasks? (?P<tasks>[\d,-]+): (?P<what>.+)")
_NODE_LOST = re.compile(r"srun: error: Node failure on")
_POLL_SECONDS = 0.25


class Step:
    """One `srun`. `run` returns its exit code; `task_errors`, `node_lost` and `hang` say what happened."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], job_id: str, cluster: ClusterConfig):
        self._command, self._environment = command, environment
        self._job_id, self._cluster = job_id, cluster
        self.task_errors: list[TaskError] = []
        self.node_lost = False
        self.hang: str | None = None
        self._first_error = 0.0

    def run(self, watch: HangWatch, superseded: Callable[[], bool]) -> int:
        """Runs the ranks to their end; `watch` says when they hang."""
        process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        listener.start()
        next_check = 0.0
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if self._first_error and time.monotonic() - self._first_error > self._cluster.kill_after_seconds:
                self._kill("the other ranks have not left")
                self._first_error = time.monotonic()  # ask again should the controller have been away
            if time.monotonic() < next_check:
                continue
            next_check = time.monotonic() + 2.0
            if superseded():
                self._kill("a newer attempt has taken over")
            elif self.hang is not None:
                self._kill(self.hang)  # the order may have been lost on its way
            elif (hang := watch.hung()) and self._kill(hang, dump=True):
                self.hang = hang  # until the order is taken it is judged anew: the ranks may have come to life again
        listener.join(timeout=5.0)
        return process.returncode

    def _kill(self, why: str, dump: bool = False) -> bool:
        """Orders the end of all ranks; whether SLURM has taken the order."""
        print(f"supervisor: ending the ranks: {why}", file=sys.stderr, flush=True)
        taken = False
        try:
            for step in client.steps(self._job_id):
                if dump:
                    client.signal_step(step, "ABRT")  # every rank that still can writes where it stands
                    taken = True  # which may have ended them all
                    time.sleep(1.0)
                client.signal_step(step, "KILL")
                taken = True
        except client.SchedulerError as error:
            print(f"supervisor: {error}{'' if taken else '; asking again'}", file=sys.stderr, flush=True)
        return taken

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if match := _TASKS.search(line):
                self.task_errors.append(TaskError(match["node"], match["tasks"], match["what"].strip()))
                self._first_error = self._first_error or time.monotonic()
            elif _NODE_LOST.search(line):
                self.node_lost = True
