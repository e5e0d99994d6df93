"""Faults 1 to 6: whatever asks a job to leave, it loses nothing and ends where an undisturbed run ends."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.records import Records
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import (
    board_steps,
    config,
    job_of,
    logged_steps,
    logs,
    lost_steps,
    pretend,
    train,
    wait_for,
    wait_for_step,
    wait_until_final,
    weights,
)

pytestmark = pytest.mark.slurm
STEPS = 24
Start = Callable[..., Cluster]
Record = Callable[[str, Any], None]


def push_out(cluster: Cluster) -> None:
    """A job of the higher partition that needs every node, for a moment."""
    cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")


def check_same(run: RunDirectory, undisturbed: RunDirectory, record_property: Record, most_lost: int) -> None:
    status = wait_until_final(run)
    assert status.state == "done", logs(run)
    lost = lost_steps(run)
    record_property("lost", max(lost, default=0))
    record_property("restarts", len(status.restarts))
    assert max(lost, default=0) <= most_lost, lost
    assert logged_steps(run) == logged_steps(undisturbed) == list(range(1, status.step + 1))
    assert board_steps(run) == board_steps(undisturbed)
    assert weights(run) == weights(undisturbed)


@pytest.mark.fault(1)
@pytest.mark.timeout(400)
def test_preemption_with_user_signal(
    start_cluster: Start, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    cluster = start_cluster(send_user_signal=True)
    run = train(config(beton, "preempted"), tmp_path)
    wait_for_step(run, random.randint(2, 12))
    push_out(cluster)
    check_same(run, undisturbed, record_property, most_lost=0)
    assert Records(run).endings()[0].kind == "preempted"


@pytest.mark.fault(2)
@pytest.mark.timeout(400)
def test_preemption_by_sigterm_alone(
    start_cluster: Start, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    cluster = start_cluster(send_user_signal=False)
    run = train(config(beton, "terminated"), tmp_path)
    wait_for_step(run, random.randint(2, 12))
    push_out(cluster)
    check_same(run, undisturbed, record_property, most_lost=0)


@pytest.mark.fault(3)
@pytest.mark.timeout(400)
def test_grace_too_short(
    start_cluster: Start, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    # killed the moment it is asked to leave
    cluster = start_cluster(grace_seconds=0, kill_wait_seconds=0)
    run = train(config(beton, "cut-off"), tmp_path)
    wait_for_step(run, 6)
    push_out(cluster)
    check_same(run, undisturbed, record_property, most_lost=2 * 4)


@pytest.mark.fault(4)
@pytest.mark.timeout(900)
def test_time_limit_in_many_slices(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    plan = {"steps": 1200, "step_seconds": 0.1, "every": 100000}
    run = pretend(tmp_path, beton, "sliced", plan, time="1", signal_lead_seconds=20)
    status = wait_until_final(run, 800.0)
    assert status.state == "done", logs(run)
    assert len(status.restarts) >= 2
    assert {restart["kind"] for restart in status.restarts} == {"time limit"}
    record_property("restarts", len(status.restarts))
    record_property("lost", max(lost_steps(run), default=0))
    assert max(lost_steps(run), default=0) == 0


@pytest.mark.fault(4)
@pytest.mark.timeout(1000)
def test_time_limit_gives_the_same_weights(
    cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record
) -> None:
    whole = train(config(beton, "whole", epochs=40), tmp_path)
    sliced = train(config(beton, "sliced", epochs=40), tmp_path, time="2", signal_lead_seconds=30)
    for run in (whole, sliced):
        assert wait_until_final(run, 800.0).state == "done", logs(run)
    endings = Records(sliced).endings()
    record_property("restarts", len(endings) - 1)
    record_property("lost", max(lost_steps(sliced)))
    assert len(endings) >= 2
    assert {ending.kind for ending in endings[:-1]} == {"time limit"}
    assert max(lost_steps(sliced)) == 0
    assert weights(whole) == weights(sliced)


@pytest.mark.fault(5)
@pytest.mark.timeout(1200)
def test_chaos(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    undisturbed = train(config(beton, "calm", epochs=12), tmp_path)
    assert wait_until_final(undisturbed).state == "done", logs(undisturbed)
    run = train(config(beton, "chaos", epochs=12), tmp_path)
    for requeued in range(10):
        wait_for(f"attempt {requeued + 1}", lambda number=requeued: run.current_attempt() > number, 90.0)
        time.sleep(random.uniform(0.0, 14.0))
        cluster.run("scontrol", "requeue", job_of(run))
    check_same(run, undisturbed, record_property, most_lost=2 * 4)


@pytest.mark.fault(6)
@pytest.mark.timeout(300)
def test_signal_during_start_up(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    run = pretend(tmp_path, beton, "early", {"steps": 20})
    job = job_of(run)
    wait_for("RUNNING", lambda: "RUNNING" in cluster.run("squeue", "-h", "-j", job, "-o", "%T"))
    for _ in range(6):  # before the supervisor, before the ranks, before their handlers
        time.sleep(0.1)
        cluster.run("bash", "-c", f"scancel --full --signal=USR2 {job} || true")
    status = wait_until_final(run)
    assert status.state == "done", logs(run)
    # one that came before the supervisor's handlers is only SLURM's to count
    assert "Restarts=0" not in cluster.run("scontrol", "show", "job", job)
    assert all(restart["kind"] == "signal" for restart in status.restarts)
    record_property("lost", max(lost_steps(run), default=0))
    assert max(lost_steps(run), default=0) == 0
