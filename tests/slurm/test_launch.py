"""The commands, on real daemons."""

import json
import os
from pathlib import Path

import pytest

from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import config, logs, pretend, wait_until_final
from tests.support import mokd

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def write_config(beton: Path, folder: Path) -> Path:
    from data_pipeline.core.schema import dump_yaml

    path = folder / "small.yaml"
    path.write_text(dump_yaml(config(beton, "small", epochs=1)))
    return path


def test_launch_to_the_end(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    small, root = write_config(beton, tmp_path), tmp_path / 'it\'s $(touch here) "quoted"'
    arguments = [small, "--nodes", "4", "--time", "10", "--root", root]
    plan = mokd("launch", *arguments, "--dry-run", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "#SBATCH --nodes=4" in plan.stdout
    assert not root.exists()
    launched = mokd("launch", *arguments, "--json", "optim.max_steps=4", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    answer = json.loads(launched.stdout)
    run = RunDirectory(Path(answer["run"]))
    assert answer == {"job_id": answer["job_id"], "run": str(root / "small")}
    assert run.path.stat().st_mode & 0o077 == 0
    status = wait_until_final(run)
    assert status.state == "done", logs(run)
    told = json.loads(mokd("status", run.path, "--json").stdout)
    assert {"run", "state", "attempt", "restarts", "step", "epoch", "checkpoint_step", "nodes"} <= told.keys()
    assert (told["state"], told["step"], told["restarts"]) == ("done", 4, [])
    assert "step 4/4" in mokd("logs", run.path).stdout
    assert "rank 3 on n4" in mokd("logs", run.path, "--rank", "3", "--follow").stdout
    again = mokd("launch", *arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert not list(tmp_path.rglob("here"))


def test_sweep_as_an_array(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    launched = mokd(
        "launch", write_config(beton, tmp_path), "--sweep", "seed=1,2", "--root", tmp_path / "runs", "--json",
        "optim.max_steps=2", cwd=tmp_path,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    runs = json.loads(launched.stdout)["runs"]
    first, second = (job["job_id"] for job in runs)
    assert first.split("_")[0] == second.split("_")[0], "one array"
    for job, seed in zip(runs, (1, 2), strict=True):
        run = RunDirectory(Path(job["run"]))
        assert wait_until_final(run).state == "done", logs(run)
        assert run.config().seed == seed


def test_refusals_are_one_line(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    small = write_config(beton, tmp_path)
    cases = {
        "invalid partition": ["--partition", "nowhere"],
        "cannot be dealt": ["--nodes", "3"],
        "set by the launcher": ["--sbatch", "output=/etc/x"],
        "unknown key": ["cluster.node=3"],
    }
    for message, arguments in cases.items():
        refused = mokd("launch", small, "--root", tmp_path / "runs", *arguments, cwd=tmp_path)
        assert refused.returncode == 2, message
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "runs" / "small").exists()  # in the way of the corrected command


def test_local(beton: Path, tmp_path: Path) -> None:
    """The same job by submitit's local executor; without SLURM on the machine, the refusal offers it."""
    small = write_config(beton, tmp_path)
    bare = os.pathsep.join(["/nonexistent"])
    refused = mokd("launch", small, "--root", tmp_path / "runs", cwd=tmp_path, PATH=bare)
    assert refused.returncode == 2
    assert "--local" in refused.stderr
    launched = mokd("launch", small, "--nodes", "2", "--local", "--root", tmp_path / "runs", "optim.max_steps=4")
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(tmp_path / "runs" / "small")
    assert wait_until_final(run).state == "done", logs(run)


def test_writable_by_others_is_refused(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    run = pretend(tmp_path, beton, "open", {"steps": 2})
    wait_until_final(run)
    (run.path / "status.json").unlink()
    run.path.chmod(0o777)
    refused = mokd("resume", run.path)
    assert refused.returncode == 2
    assert "writable by others" in refused.stderr
