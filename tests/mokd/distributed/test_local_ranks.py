"""Ranks on this machine: a mistake that all of them find is told by the first, however late it finds it."""

import os
import signal
import subprocess
import sys

import pytest

from mokd.distributed.local_ranks import supervise
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED, EXIT_USER
from tests.support import ROOT

PROGRAM = f"""
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(1.0)
    print("error: what is wrong", file=sys.stderr)
sys.exit({EXIT_USER})
"""


def test_the_first_rank_may_say_what_is_wrong_when_another_has_left(capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise([sys.executable, "-c", PROGRAM], 2) == EXIT_USER
    assert capfd.readouterr().err == "error: what is wrong\n"


# a rank that says by which signal it was asked to stop
ASKED = f"""
import sys, time
from mokd.distributed.stopping import StopRequest
stop = StopRequest()
stop.install()
print("ready", flush=True)
while not stop.reason:
    time.sleep(0.02)
print(stop.reason, flush=True)
sys.exit({EXIT_STOPPED})
"""
# and one that is still importing
STARTING = """
import time
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "number", "says"),
    [
        (ASKED, signal.SIGINT, "SIGINT\n"),
        (ASKED, signal.SIGTERM, "SIGTERM\n"),
        (ASKED, signal.SIGUSR1, "SIGUSR1\n"),
        (STARTING, signal.SIGINT, ""),
    ],
)
def test_ranks_hear_the_signal_that_was_sent(program: str, number: signal.Signals, says: str) -> None:
    command = (
        f"import sys; from mokd.distributed.local_ranks import supervise; "
        f"sys.exit(supervise([sys.executable, '-c', {program!r}], 1))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == says
    assert process.returncode == EXIT_STOPPED


def test_more_ranks_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with pytest.warns(UserWarning, match="--nproc: 3 ranks share 2 cores"):
        assert supervise([sys.executable, "-c", "pass"], 3) == EXIT_DONE
