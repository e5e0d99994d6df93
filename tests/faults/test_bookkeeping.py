"""Faults 14 and 20, and further ones that were found on the way: what a run's owner sees, and what he may do to it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from launcher.runs.records import Records
from launcher.slurm import client
from launcher.slurm.status import read_status
from launcher.slurm.submit import cancel, submit
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.disks import fill, small_file_system
from tests.slurm.harness import (
    PAYLOAD,
    Record,
    Start,
    check_lost,
    cluster_config,
    config,
    finished,
    job_of,
    kill,
    logged_steps,
    logs,
    losses_by_step,
    pretend,
    ranks,
    relative_distance,
    train,
    wait_for,
    wait_for_step,
    wait_until_final,
)

pytestmark = pytest.mark.slurm
# a batch that 4, 2 and 3 ranks can share
TWELVE = {"optim.global_batch": 12, "optim.epochs": 5}
LONG = {"steps": 100000, "step_seconds": 0.1, "every": 10}


def seen_within_five_seconds(run: RunDirectory, state: str) -> float:
    began = time.monotonic()
    wait_for(state, lambda: read_status(run).state == state, 5.0)
    return round(time.monotonic() - began, 1)


@pytest.mark.fault(14)
@pytest.mark.timeout(200)
def test_cancelled_without_accounting(
    start_cluster: Start, beton: Path, tmp_path: Path, record_property: Record
) -> None:
    cluster = start_cluster(min_job_age_seconds=2)
    with pytest.raises(Exception, match="sacct"):
        cluster.run("sacct")  # there is no accounting here
    run = pretend(tmp_path, beton, "cancelled", LONG)
    assert read_status(run).state in ("pending", "starting")
    wait_for_step(run, 3)
    assert read_status(run).state == "running"
    cluster.run("scancel", job_of(run))
    record_property("seen_seconds", seen_within_five_seconds(run, "cancelled"))
    assert not ranks(run)
    waiting = pretend(tmp_path, beton, "waiting", LONG, sbatch={"begin": "now+1hour"})
    assert seen_within_five_seconds(waiting, "pending") < 5.0
    cluster.run("scancel", job_of(waiting))
    seen_within_five_seconds(waiting, "cancelled")
    for job in (job_of(run), job_of(waiting)):
        wait_for("SLURM to forget", lambda job=job: "Invalid" in cluster.ask("scontrol", "show", "job", job), 60.0)
    assert read_status(run).state == read_status(waiting).state == "cancelled"


def started_on_a_full_disk(cluster: Cluster, beton: Path, disk: Path) -> tuple[RunDirectory, str, Path]:
    """A run whose job has begun while its disk is full: the run, the job, and the file that fills the disk."""
    run = train(config(beton, "full"), disk, nodes=1, sbatch={"begin": "now+1hour"})
    job = job_of(run)
    (filler,) = fill(disk, "room", 0)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for("the start", lambda: (found := client.find_job(job)) is not None and found.state == "RUNNING")
    return run, job, filler


@pytest.mark.fault(33)
@pytest.mark.timeout(300)
def test_run_directory_full_at_a_start(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    with small_file_system(tmp_path / "small", "size=64m") as disk:
        run, job, filler = started_on_a_full_disk(cluster, beton, disk)
        time.sleep(5.0)
        assert not Records(run).attempt_facts(1), "the attempt was recorded on a full disk"
        filler.unlink()
        freed = time.time()
        finished(run)
        assert client.find_job(job).restarts == 0  # type: ignore[union-attr]
        record_property("begun_seconds_after", round(Records(run).attempt_facts(1)["time"] - freed, 1))


@pytest.mark.fault(33)
@pytest.mark.timeout(300)
def test_signal_while_the_run_directory_is_full(
    cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record
) -> None:
    with small_file_system(tmp_path / "small", "size=64m") as disk:
        run, job, filler = started_on_a_full_disk(cluster, beton, disk)
        time.sleep(7.0)  # into the third pause, which is one of 15 s
        asked = time.time()
        cluster.run("scancel", "--full", "--signal=USR2", job)
        wait_for("the requeue", lambda: (found := client.find_job(job)) is not None and found.restarts == 1, 10.0)
        record_property("requeued_seconds_after", round(time.time() - asked, 1))
        filler.unlink()
        finished(run)
        assert Records(run).attempt_facts(1)["restart"] == 1


@pytest.mark.timeout(200)
def test_cancel_saves_and_resume_continues(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    run = pretend(tmp_path, beton, "pause", {"steps": 60, "step_seconds": 0.1, "every": 100000})
    wait_for_step(run, 5)
    with pytest.raises(UserError, match="still at work"):
        submit(run, cluster_config(), entry=PAYLOAD)  # two jobs on one run directory
    cancel(run)
    seen_within_five_seconds(run, "cancelled")
    saved = wait_for("the save", lambda: read_status(run).checkpoint_step)
    assert saved >= 5
    wait_for("the job to go", lambda: not ranks(run))
    submit(run, cluster_config(nodes=3), entry=PAYLOAD)
    assert finished(run).attempt == 2, logs(run)


@pytest.mark.fault("storm")
@pytest.mark.timeout(200)
def test_signal_storm(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    run = pretend(tmp_path, beton, "storm", {"steps": 60, "step_seconds": 0.1, "every": 100000})
    wait_for_step(run, 10)
    reached = 0
    for _ in range(200):
        reached = max(reached, int(run.read_status().get("step", 0)))
        kill(ranks(run).values(), signal.SIGTERM)
        kill(ranks(run).values(), signal.SIGUSR2)
    status = finished(run)
    assert status.restarts[0]["step"] >= reached
    check_lost(run, 0, record_property)


@pytest.mark.fault("config")
@pytest.mark.timeout(200)
def test_corrupt_configuration_fails_once(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    run = train(config(beton, "corrupt"), tmp_path)
    run.config_file.write_text("name: corrupt\nbranches: [")
    status = wait_until_final(run)
    assert status.state == "failed", logs(run)
    assert "not valid YAML" in status.reason
    assert status.restarts == []


@pytest.mark.fault("two jobs")
@pytest.mark.timeout(200)
def test_older_launch_steps_aside(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    run = pretend(tmp_path, beton, "twice", {"steps": 100, "step_seconds": 0.1})
    wait_for_step(run, 5)
    first = job_of(run)
    # as if the scheduler had not known of the first job: a race, or another cluster
    records = Records(run)
    launch = records.last_launch()
    assert launch is not None
    records.write_launch(type(launch)(**{**vars(launch), "job_id": "999999"}))
    submit(run, cluster_config(), entry=PAYLOAD)
    wait_for("the first job to leave", lambda: first not in cluster.run("squeue", "-h", "-o", "%i").split())
    assert finished(run).attempt == 2


@pytest.mark.fault(20)
@pytest.mark.timeout(600)
def test_other_world_sizes(cluster: Cluster, beton: Path, tmp_path: Path, record_property: Record) -> None:
    """4, then 2, then 3 ranks: the same images in the same order under the same schedules."""
    steady = train(config(beton, "steady", **TWELVE), tmp_path, nodes=4)
    finished(steady)
    changing = train(config(beton, "changing", **TWELVE), tmp_path, nodes=4)
    for nodes, until in ((2, 5), (3, 11)):
        wait_for_step(changing, until, attempt=changing.current_attempt() or 1)
        cancel(changing)
        wait_for("the ranks to leave", lambda: not ranks(changing))
        seen_within_five_seconds(changing, "cancelled")
        submit(changing, cluster_config(nodes=nodes))
        wait_for("the next attempt", lambda: read_status(changing).state == "running", 90.0)
    finished(changing)
    assert logged_steps(changing) == logged_steps(steady)
    losses = [losses_by_step(run) for run in (steady, changing)]
    assert losses[0].keys() == losses[1].keys()
    apart = max(abs(losses[1][key] / value - 1.0) for key, value in losses[0].items())
    distance = relative_distance(steady, changing)
    record_property("relative_difference_of_losses", f"{apart:.1e}")
    record_property("relative_distance_of_weights", f"{distance:.1e}")
    # another image anywhere changes a loss by some per cent
    assert apart < 1e-3
    assert distance < 1e-4


@pytest.mark.fault(20)
@pytest.mark.timeout(200)
def test_edited_source_changes_nothing(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    """The job is started from inside a checkout, as people do, which is then broken."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for package in ("launcher", "mokd", "data_pipeline", "tests"):
        (checkout / package).symlink_to(Path(__file__).resolve().parents[2] / package)
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.slurm import harness\n"
        "run = harness.pretend(Path(sys.argv[1]), Path(sys.argv[2]), 'edited', {'steps': 60, 'step_seconds': 0.1})\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(beton)], cwd=checkout, check=True)
    (checkout / "launcher").unlink()
    (checkout / "launcher").mkdir()
    (checkout / "launcher" / "__init__.py").write_text("raise SystemExit('the checkout ran')")
    run = RunDirectory(tmp_path / "edited")
    wait_for_step(run, 5)
    kill(ranks(run).values(), signal.SIGUSR2)
    status = finished(run)
    assert len(status.restarts) == 1
    where = json.loads((run.path / "where.json").read_text())
    assert where == str(run.path / "code" / "launcher" / "slurm" / "rank_entry.py")
