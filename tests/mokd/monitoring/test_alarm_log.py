"""Alarms of a real run: on file, in the metrics, told to a command, shown; a resumed run has none twice."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launcher.cli import main as cli
from launcher.slurm.status import read_status
from mokd.distributed.stopping import StopRequest
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from mokd.training import entry
from tests.support import tiny_config


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A run sets torch's threads, which are this process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_alarms_are_on_file_once_told_and_shown(beton: Path, tmp_path: Path) -> None:
    alarms = {"from_step": 0, "patience": 3, "cross_to_self": 1e-9}  # a healthy run weighs more than this
    changes = {"logging__alarms": alarms, "optim__max_steps": 8, "checkpoint": {"every_steps": 2, "keep_last": 10}}
    command = 'sleep 0.1; echo "$MOKD_STEP $MOKD_ALARM $MOKD_ADVICE" >> "$MOKD_RUN/told"; echo said'
    config = tiny_config(beton, **changes, logging__on_alarm=command)
    run = RunDirectory.create(tmp_path / "run", config)
    assert entry.run(run.path, StopRequest()).state == "done"

    lines = read_metrics(run.alarms_file)
    dominating = [line for line in lines if line["alarm"].startswith("cross_dominates")]
    assert [(line["step"], line["alarm"]) for line in dominating] == [
        (3, "cross_dominates/resnet"),
        (3, "cross_dominates/vit"),
    ]
    logged = {record["step"]: record["alarms"] for record in read_metrics(run.metrics_file) if "alarms" in record}
    assert logged[2] == 0
    assert logged[3] == 2
    wait_for_lines(run.path / "told", len(lines))
    assert f"3 cross_dominates/vit {dominating[1]['advice']}\n" in (run.path / "told").read_text()
    assert "said" in (run.path / "on_alarm.log").read_text()

    status = read_status(run)
    assert [alarm["alarm"] for alarm in status.alarms] == [line["alarm"] for line in lines]
    assert status.alarms_now == logged[8]
    shown = CliRunner().invoke(cli.app, ["status", str(run.path)], env={"COLUMNS": "250"})
    assert "alarm at step 3" in shown.stdout
    assert "lower branches.vit.weight" in shown.stdout
    document = json.loads(CliRunner().invoke(cli.app, ["status", str(run.path), "--json"]).stdout)
    assert document["alarms"][0]["alarm"] == lines[0]["alarm"]

    # resumed after the alarm and before it: neither way twice
    for lost in ((8,), (4, 6, 8)):
        for step in lost:
            shutil.rmtree(run.checkpoints / f"step-{step}")
        assert entry.run(run.path, StopRequest()).state == "done"
        again = read_metrics(run.alarms_file)
        assert [(line["step"], line["alarm"]) for line in again] == [(line["step"], line["alarm"]) for line in lines]
        now = {record["step"]: record["alarms"] for record in read_metrics(run.metrics_file) if "alarms" in record}
        assert now == logged


def wait_for_lines(file: Path, count: int) -> None:
    """The command goes on beside the training, and may be slower."""
    deadline = time.monotonic() + 30
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the command did not come to its end"
        time.sleep(0.05)


def test_a_command_that_cannot_be_started_and_one_that_fails_cost_nothing(beton: Path, tmp_path: Path) -> None:
    alarms = {"from_step": 0, "patience": 1, "cross_to_self": 1e-9}
    changes = {"logging__alarms": alarms, "optim__max_steps": 2, "logging__on_alarm": "no-such-command; exit 3"}
    run = RunDirectory.create(tmp_path / "run", tiny_config(beton, **changes))
    assert entry.run(run.path, StopRequest()).state == "done"
    assert len(read_metrics(run.alarms_file)) >= 2
