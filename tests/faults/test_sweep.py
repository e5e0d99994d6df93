"""Faults 26 and 27: what goes wrong with one run of a job array ends and restarts that run, and no other."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm.status import read_status
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import (
    config,
    controller_has_saved,
    kill,
    logged_steps,
    logs,
    lost_steps,
    ranks,
    sweep,
    wait_for,
    wait_for_step,
    wait_until_final,
    weights,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]


@pytest.mark.fault(26)
def test_hang_in_a_sweep(
    cluster: Cluster, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Any
) -> None:
    """Three runs of the real trainer: one hangs, one loses a rank, nothing happens to the third."""
    # collectives wait for ever: nobody but the supervisor ends the one that hangs
    patient = {"parallel.timeout_seconds": 1800.0}
    names = ("hung", "killed", "calm")
    hung, killed, calm = sweep([config(beton, name, **patient) for name in names], tmp_path, hang_timeout_seconds=30)
    faults = {hung.path: signal.SIGSTOP, killed.path: signal.SIGKILL}

    def strike() -> bool:
        for run in (hung, killed):
            if run.path in faults and run.read_status().get("step", 0) >= 6:
                ranks(run)[1].signal(faults.pop(run.path))
        return not faults

    wait_for("both runs to be struck", strike, 200.0)
    for run in (hung, killed, calm):
        assert wait_until_final(run).state == "done", logs(run)
        assert weights(run) == weights(undisturbed)
        assert logged_steps(run) == logged_steps(undisturbed)
    lost = lost_steps(hung) + lost_steps(killed)
    record_property("lost", max(lost))
    assert max(lost) <= 2 * 4
    assert [restart["reason"].split(":")[0] for restart in read_status(hung).restarts] == ["hang"]
    assert ["rank 1" in restart["reason"] for restart in read_status(killed).restarts] == [True]
    assert read_status(calm).restarts == []


@pytest.mark.fault(27)
def test_controller_away_during_a_hang_kill(
    cluster: Cluster, beton: Path, tmp_path: Path, record_property: Any
) -> None:
    plan = {"steps": 400, "step_seconds": 0.1, "every": 10}
    hung, calm = sweep([config(beton, name) for name in ("hung", "calm")], tmp_path, plan, hang_timeout_seconds=8)
    wait_for_step(hung, 15)
    wait_for_step(calm, 1)
    controller_has_saved(cluster, hung)
    found = ranks(hung)
    cluster.stop("slurmctld", signal.SIGKILL)
    try:
        (hung.path / "hold").touch()
        found[1].signal(signal.SIGSTOP)
        wait_for("an order that is lost", lambda: "asking again" in logs(hung), 90.0)
        assert all(process.alive for process in found.values())
    finally:
        cluster.start("slurmctld")
    try:
        wait_for("the ranks to be gone", lambda: not any(process.alive for process in found.values()), 60.0)
    finally:
        kill(found.values())
        (hung.path / "hold").unlink()
    for run in (hung, calm):
        assert wait_until_final(run).state == "done", logs(run)
    assert [re.sub(r":.*", "", restart["reason"]) for restart in read_status(hung).restarts] == ["hang"]
    assert read_status(calm).restarts == []
    record_property("lost", max(lost_steps(hung)))
    assert max(lost_steps(hung)) <= 10
