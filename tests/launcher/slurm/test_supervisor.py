"""What the supervisor does where its run directory takes no files; with SLURM: tests/faults."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.runs.records import Records
from launcher.slurm import client, supervisor
from mokd.runs.exit_codes import EXIT_DONE, EXIT_GAVE_UP
from mokd.runs.run_directory import RunDirectory
from tests.disks import fill, small_file_system
from tests.support import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with small_file_system(tmp_path / "small", "size=1m") as disk:
        made = RunDirectory.create(disk / "run", tiny_config(tmp_path / "train.beton"))
        Records(made).new_launch("slurm", {"nodes": 1}, made.jobs)
        yield made


def test_a_disk_that_stays_full_is_said_in_one_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(supervisor.Supervisor, "listen", lambda self: None)  # handlers that would outlive the test
    fill(run.path.parent, "room", 0)
    assert supervisor.main(["--launch", "1", str(run.path), "--", "true"]) == EXIT_GAVE_UP
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if "No space left on device" in line and "trying again" in line]) == 2
    assert lines[-1].startswith("error: ")
    assert lines[-1].endswith(f"not requeued: once files can be written there, mokd resume {run.path}")
    assert run.current_attempt() == 0


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the signal handlers that a supervisor has changed in this process."""
    listened = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in listened}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("state", "orders"), [("COMPLETING", []), ("RUNNING", ["7"])])
def test_a_signal_cuts_the_waiting_short(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], state: str, orders: list[str]
) -> None:
    # SLURM's two answers stand in here; tests/faults/test_bookkeeping.py asks the real daemons
    given: list[str] = []
    job = client.Job("7", state, reason="", nodes="n1", excluded="", partition="", restarts=0, preempted=False)
    monkeypatch.setattr(client, "requeue", lambda job_id, patience: given.append(job_id))
    monkeypatch.setattr(client, "find_job", lambda job_id: job)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(supervisor, "PAUSES_SECONDS", (60.0,))
    fill(run.path.parent, "room", 0)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    assert supervisor.main(["--launch", "1", str(run.path), "--", "true"]) == EXIT_DONE
    assert given == orders  # a cancelled job is not brought back
    assert run.current_attempt() == 0
    assert "SIGUSR2" in capfd.readouterr().err or not orders
