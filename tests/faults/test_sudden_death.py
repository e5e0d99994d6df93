"""Faults 7 and 9 to 13: processes, nodes and daemons that vanish or stall without a word."""

import re
import signal
import time
from pathlib import Path

import pytest

from launcher.runs.records import Records, checkpoint_step
from launcher.slurm.status import read_status
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import (
    Record,
    attempt_record,
    both_ranks,
    check_lost,
    check_same,
    children,
    config,
    controller_has_saved,
    finished,
    kill,
    logs,
    pretend,
    ranks,
    train,
    wait_for,
    wait_for_step,
    wait_until_final,
)

pytestmark = pytest.mark.slurm


@pytest.mark.fault(7)
@pytest.mark.timeout(300)
def test_killed_rank(
    cluster: Cluster, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    run = train(config(beton, "killed"), tmp_path)
    wait_for_step(run, 6)
    found = ranks(run)
    began = time.monotonic()
    kill([found[1]])
    wait_for("all ranks to be gone", lambda: not ranks(run), 15.0)
    record_property("all_down_seconds", round(time.monotonic() - began, 1))
    check_same(run, undisturbed, 2 * 4, record_property)
    assert [restart["kind"] for restart in read_status(run).restarts] == ["failure"]
    assert "rank 1 on n2" in read_status(run).restarts[0]["reason"]


@pytest.mark.fault(9)
@pytest.mark.parametrize("victim", ["n2", "n1"])
@pytest.mark.timeout(300)
def test_node_dies(
    cluster: Cluster, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record, victim: str
) -> None:
    run = train(config(beton, f"without-{victim}"), tmp_path)
    wait_for_step(run, 6)
    assert attempt_record(run, 1)["nodes"] == "n[1-2]"
    steps, rank = children(cluster, victim), ranks(run)[int(victim[1]) - 1]
    assert steps
    began = time.monotonic()
    # slurmd first: it must not live to report the deaths of the others
    cluster.stop(victim, signal.SIGKILL)
    kill([*steps, rank])
    try:
        wait_for("the next attempt", lambda: run.current_attempt() > 1, 60.0)
        wait_for("its ranks", lambda: ranks(run), 30.0)
        record_property("elsewhere_seconds", round(time.monotonic() - began, 1))
        assert time.monotonic() - began < 60.0
        assert victim not in attempt_record(run, run.current_attempt())["nodes"]
        check_same(run, undisturbed, 2 * 4, record_property)
    finally:
        cluster.wipe_spool(victim)
        cluster.start(victim)
        cluster.wait_until_idle([victim])


@pytest.mark.fault(10)
@pytest.mark.timeout(400)
def test_zombie_attempt(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    """One node with both ranks, whose slurmd alone is killed: SLURM starts the job elsewhere, the old ranks go on."""
    plan = {"steps": 900, "step_seconds": 0.1, "every": 10}
    run = pretend(tmp_path, beton, "zombie", plan, nodes=1, tasks_per_node=2)
    wait_for_step(run, 5)
    old = ranks(run)
    cluster.stop("n1", signal.SIGKILL)
    try:
        wait_for("the next attempt", lambda: run.current_attempt() > 1, 90.0)
        assert any(process.alive for process in old.values()), "nothing was left behind: not this fault"
        # the leftover is refused at its next write and leaves by itself
        wait_for("the leftovers to go", lambda: not any(process.alive for process in old.values()), 60.0)
        status = finished(run)
        assert status.restarts[0]["kind"] in ("lost", "node lost")
        check_lost(run, 2 * 10, record_property)
    finally:
        kill(old.values())
        cluster.wipe_spool("n1")
        cluster.start("n1")
        cluster.wait_until_idle(["n1"])


@pytest.mark.fault(11)
@pytest.mark.timeout(400)
def test_hang(
    cluster: Cluster, beton: Path, undisturbed: RunDirectory, tmp_path: Path, record_property: Record
) -> None:
    """A rank is stopped; the other waits for it in a collective, whose own limit is far away."""
    patient = {"parallel.timeout_seconds": 1800.0}
    run = train(config(beton, "hang", **patient), tmp_path, hang_timeout_seconds=30)
    wait_for_step(run, 6)
    ranks(run)[1].signal(signal.SIGSTOP)
    began = time.monotonic()
    wait_for("all ranks to be gone", lambda: not ranks(run), 90.0)
    record_property("noticed_seconds", round(time.monotonic() - began, 1))
    check_same(run, undisturbed, 2 * 4, record_property)
    restarts = read_status(run).restarts
    assert [restart["kind"] for restart in restarts] == ["failure"]
    assert restarts[0]["reason"].startswith("hang: ")


@pytest.mark.fault(12)
@pytest.mark.timeout(300)
def test_bad_node(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    run = pretend(tmp_path, beton, "bad-node", {"steps": 150, "step_seconds": 0.1, "bad_node": "n2"})
    status = finished(run)
    endings = wait_for("the last word", lambda: len(found := Records(run).endings()) == 3 and found)
    assert [ending.blamed for ending in endings] == [["n2"], ["n2"], []]
    assert [ending.nodes for ending in endings[:2]] == ["n[1-2]"] * 2
    assert endings[2].nodes in ("n[1,3]", "n[3-4]")
    record_property("restarts", len(status.restarts))


@pytest.mark.fault(13)
@pytest.mark.timeout(300)
def test_controller_down(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    run = pretend(tmp_path, beton, "orphan", {"steps": 400, "step_seconds": 0.1, "every": 100000})
    wait_for_step(run, 10)
    found = both_ranks(run)
    controller_has_saved(cluster, run)
    cluster.stop("slurmctld", signal.SIGKILL)
    try:
        kill(found.values(), signal.SIGUSR2)
        wait_for("the ranks to leave", lambda: not ranks(run), 30.0)
        saved = checkpoint_step(run)
        began = time.monotonic()
        alone = read_status(run)  # asks for half a minute
        assert (alone.state, alone.step) == ("stopped", saved)
        assert "this is what the run's own files say" in alone.reason
        time.sleep(max(25.0 - (time.monotonic() - began), 0.0))
    finally:
        cluster.start("slurmctld")
    status = finished(run)
    assert [restart["step"] for restart in status.restarts] == [saved]
    assert saved >= 10
    check_lost(run, 0, record_property)


@pytest.mark.fault(21)
@pytest.mark.timeout(300)
def test_crash_loop(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    run = pretend(tmp_path, beton, "poisoned", {"steps": 40, "every": 10, "fail_at": 25})
    status = wait_until_final(run)
    assert status.state == "failed", logs(run)
    assert re.search(r"no progress beyond step 2\d in 3 restarts", status.reason)
    assert "batch 25 is poisoned" in status.reason
    assert len(status.restarts) == 3
    record_property("restarts", len(status.restarts))


@pytest.mark.fault(29)
@pytest.mark.timeout(300)
def test_error_that_would_come_again(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    """An error that bears `final`, as one about a loss that is not finite does, ends the run the first time."""
    run = pretend(tmp_path, beton, "final", {"steps": 40, "final_error": "step 7: the loss is not finite"})
    status = wait_until_final(run)
    assert status.state == "failed", logs(run)
    assert "step 7: the loss is not finite" in status.reason
    assert status.restarts == []
    ending = wait_for("the last word", lambda: Records(run).endings())[0]
    assert (ending.kind, ending.blamed) == ("failed", [])
