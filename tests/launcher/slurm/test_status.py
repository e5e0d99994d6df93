"""The state of a run whose scheduler does not answer; on real daemons: fault 13."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import main as cli
from launcher.report.summary import summary
from launcher.runs.records import Ending, Records
from launcher.slurm.status import read_status
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that was launched, in a place where SLURM's commands are there and refuse to say anything."""
    commands = tmp_path / "bin"
    commands.mkdir()
    # stand-ins: real commands need daemons that were there before, and then try for half a minute
    for name in ("sbatch", "scontrol", "squeue", "scancel"):
        (commands / name).write_text(
            "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    run = RunDirectory.create(tmp_path / "run", tiny_config(tmp_path / "train.beton"))
    records = Records(run)
    launch = records.new_launch("slurm", {"nodes": 1}, run.jobs)
    run.claim_attempt({"launch": launch.number})
    run.write_status("running", 1, step=7)
    records.write_launch(type(launch)(**{**launch.__dict__, "job_id": "12"}))
    return run


def test_its_own_files_say_what_they_know(launched: RunDirectory) -> None:
    status = read_status(launched)
    assert (status.state, status.step) == ("running", 7)
    assert status.reason.endswith("this is what the run's own files say")
    assert summary(launched).state == "running"
    Records(launched).write_ending(Ending(1, 1, "cancelled", "cancelled", "the job was cancelled", 7))
    assert read_status(launched).state == "cancelled"


def test_what_needs_the_scheduler_ends_in_one_line(launched: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["cancel", str(launched.path)])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: ")
    assert "Unable to contact slurm controller" in line
