"""Several ranks on this machine without a launcher: start, pass on signals, end together."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from mokd.distributed.free_port import free_port
from mokd.distributed.stopping import STOP_SIGNALS
from mokd.runs.exit_codes import EXIT_STOPPED, EXIT_USER
from mokd.runs.processes import catches

GRACE_SECONDS = 10.0
SAYING_SECONDS = 5.0


def train_locally(directory: Path, count: int) -> int:
    """Runs `python -m mokd.training.entry` in `count` ranks on this machine and returns the run's exit status.

    A stop signal is passed on to all ranks once; when a rank fails, the others are ended within seconds.
    """
    return supervise([sys.executable, "-m", "mokd.training.entry", str(directory)], count)


def supervise(command: Sequence[str], count: int) -> int:
    """Runs `command` in `count` processes with torchrun's variables; the first failure's status, else theirs."""
    cores = len(os.sched_getaffinity(0))
    if count > cores:
        warnings.warn(f"--nproc: {count} ranks share {cores} cores of this process", stacklevel=2)
    port = free_port()
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    workers: list[subprocess.Popen[bytes]] = []
    try:
        workers = [_start(command, rank, count, port) for rank in range(count)]
        passed = 0
        while None in [worker.poll() for worker in workers]:  # a list: every worker is looked at, every time
            if failed := [w.returncode for w in workers if w.returncode not in (None, 0, EXIT_STOPPED)]:
                if failed[0] == EXIT_USER:
                    _wait(workers, SAYING_SECONDS)  # the same mistake on all ranks, and the first one is to say it
                _end(workers)
                # a rank that was still starting up has no handler yet: it ends, and nothing is lost
                return EXIT_STOPPED if asked and failed[0] == -signal.SIGTERM else _status(failed[0])
            while passed < len(asked):
                for worker in workers:
                    if worker.poll() is None:
                        worker.send_signal(_fitting(asked[passed], worker))
                passed += 1
            time.sleep(0.05)
        statuses = [EXIT_STOPPED if asked and w.returncode == -signal.SIGTERM else w.returncode for w in workers]
        return _status(next((s for s in statuses if s not in (0, EXIT_STOPPED)), max(statuses)))
    finally:
        _end(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_once(status: int) -> None:
    """Ends the process without tearing the interpreter down: everything is written and closed by now, and threads of
    torch.distributed have been seen to abort a process in its last moment, which would turn success into failure.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _start(command: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # a session of its own: Ctrl-C in the terminal reaches the workers once, through here
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)


def _fitting(number: int, worker: subprocess.Popen[bytes]) -> int:
    """The signal that was received, so that the rank can say which; SIGTERM ends one that has no handlers yet."""
    return number if catches(worker.pid, signal.SIGTERM) else signal.SIGTERM


def _end_with_parent() -> None:
    """Asks the kernel to stop this rank when its supervisor is gone, however it went: no rank trains on by itself."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _wait(workers: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(max(deadline - time.monotonic(), 0.0))


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    _wait(workers, GRACE_SECONDS)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _status(returncode: int) -> int:
    """A shell's view of an exit status: 128 + n for a process that signal n has ended."""
    return 128 - returncode if returncode < 0 else returncode
