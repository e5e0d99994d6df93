"""Faults 26 and 27: what goes wrong with one run of a job array ends and restarts that run, and no other."""

import re
import signal
from pathlib import Path

import pytest

from launcher.slurm.status import read_status
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import (
    Record,
    attempt_record,
    both_ranks,
    check_lost,
    check_same,
    config,
    controller_has_saved,
    finished,
    kill,
    logs,
    push_out,
    ranks,
    sweep,
    wait_for,
    wait_for_step,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]


@pytest.mark.fault(26)
def test_three_faults_in_a_sweep(
    cluster: Cluster, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    """Three runs of the real trainer, each on a node of its own: one is preempted, one hangs, one loses a rank."""
    # collectives wait for ever: nobody but the supervisor ends the one that hangs
    patient = {"parallel.timeout_seconds": 1800.0}
    alone = {"nodes": 1, "tasks_per_node": 2, "sbatch": {"exclusive": True}}
    names = ("preempted", "hung", "killed")
    runs = sweep([config(beton, name, **patient) for name in names], tmp_path, hang_timeout_seconds=30, **alone)
    preempted, hung, killed = runs
    faults = {
        preempted.path: lambda: push_out(cluster, attempt_record(preempted, 1)["nodes"]),
        hung.path: lambda: ranks(hung)[1].signal(signal.SIGSTOP),
        killed.path: lambda: ranks(killed)[1].signal(signal.SIGKILL),
    }

    def strike() -> bool:
        for run in runs:
            if run.path in faults and run.read_status().get("step", 0) >= 6:
                faults.pop(run.path)()
        return not faults

    wait_for("every run to be struck", strike, 200.0)
    for run in runs:
        check_same(run, undisturbed, 0 if run is preempted else 2 * 4, record_property)
    assert [restart["kind"] for restart in read_status(preempted).restarts] == ["preempted"]
    assert [restart["reason"].split(":")[0] for restart in read_status(hung).restarts] == ["hang"]
    assert ["rank 1" in restart["reason"] for restart in read_status(killed).restarts] == [True]


@pytest.mark.fault(27)
def test_controller_away_during_a_hang_kill(
    cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record
) -> None:
    plan = {"steps": 400, "step_seconds": 0.1, "every": 10}
    hung, calm = sweep([config(beton, name) for name in ("hung", "calm")], tmp_path, plan, hang_timeout_seconds=8)
    wait_for_step(hung, 15)
    wait_for_step(calm, 1)
    controller_has_saved(cluster, hung)
    found = both_ranks(hung)
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
        finished(run)
    assert [re.sub(r":.*", "", restart["reason"]) for restart in read_status(hung).restarts] == ["hang"]
    assert read_status(calm).restarts == []
    check_lost(hung, 10, record_property)
