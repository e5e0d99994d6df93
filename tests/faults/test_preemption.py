"""Faults 1 to 6: whatever asks a job to leave, it loses nothing and ends where an undisturbed run ends."""

import random
import time
from pathlib import Path

import pytest

from launcher.runs.records import Records
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import (
    Record,
    Start,
    check_lost,
    check_same,
    config,
    finished,
    job_of,
    pretend,
    push_out,
    train,
    wait_for,
    wait_for_step,
)

pytestmark = pytest.mark.slurm


@pytest.mark.fault(1)
@pytest.mark.timeout(400)
def test_preemption_with_user_signal(
    start_cluster: Start, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    cluster = start_cluster(send_user_signal=True)
    run = train(config(beton, "preempted"), tmp_path)
    wait_for_step(run, random.randint(2, 12))
    push_out(cluster)
    check_same(run, undisturbed, 0, record_property)
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
    check_same(run, undisturbed, 0, record_property)


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
    check_same(run, undisturbed, 2 * 4, record_property)


@pytest.mark.fault(4)
@pytest.mark.timeout(900)
def test_time_limit_in_many_slices(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    plan = {"steps": 1200, "step_seconds": 0.1, "every": 100000}
    run = pretend(tmp_path, beton, "sliced", plan, time="1", signal_lead_seconds=20)
    status = finished(run, 800.0)
    assert len(status.restarts) >= 2
    assert {restart["kind"] for restart in status.restarts} == {"time limit"}
    record_property("restarts", len(status.restarts))
    check_lost(run, 0, record_property)


@pytest.mark.fault(4)
@pytest.mark.timeout(1000)
def test_time_limit_gives_the_same_weights(
    cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record
) -> None:
    whole = train(config(beton, "whole", epochs=40), tmp_path)
    sliced = train(config(beton, "sliced", epochs=40), tmp_path, time="2", signal_lead_seconds=30)
    for run in (whole, sliced):
        finished(run, 800.0)
    # the ranks say that all is done a moment before the supervisor does
    ended = "the supervisor's last word"
    wait_for(ended, lambda: any(ending.verdict == "done" for ending in Records(sliced).endings()))
    endings = Records(sliced).endings()
    assert len(endings) >= 2
    assert {ending.kind for ending in endings[:-1]} == {"time limit"}
    check_same(sliced, whole, 0, record_property)


@pytest.mark.fault(5)
@pytest.mark.timeout(1200)
def test_chaos(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    undisturbed = train(config(beton, "calm", epochs=12), tmp_path)
    steps, times = finished(undisturbed).step, 10
    run = train(config(beton, "chaos", epochs=12), tmp_path)
    for requeued in range(times):
        wait_for(f"attempt {requeued + 1}", lambda number=requeued: run.current_attempt() > number, 90.0)
        # at a random moment, but before the steps that are left would be too few for the requeues that are left
        share, moment = steps * (requeued + 1) // (times + 1), time.monotonic() + random.uniform(0.0, 14.0)
        while time.monotonic() < moment and int(run.read_status().get("step", 0)) < share:
            time.sleep(0.02)
        cluster.run("scontrol", "requeue", job_of(run))
    check_same(run, undisturbed, 2 * 4, record_property)


@pytest.mark.fault(6)
@pytest.mark.timeout(300)
def test_signal_during_start_up(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    run = pretend(tmp_path, beton, "early", {"steps": 20})
    job = job_of(run)
    wait_for("RUNNING", lambda: "RUNNING" in cluster.run("squeue", "-h", "-j", job, "-o", "%T"))
    for _ in range(6):  # before the supervisor, before the ranks, before their handlers
        time.sleep(0.1)
        cluster.run("bash", "-c", f"scancel --full --signal=USR2 {job} || true")
    status = finished(run)
    # one that came before the supervisor's handlers is only SLURM's to count
    assert "Restarts=0" not in cluster.run("scontrol", "show", "job", job)
    assert all(restart["kind"] == "signal" for restart in status.restarts)
    check_lost(run, 0, record_property)
