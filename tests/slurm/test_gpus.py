"""GPUs that SLURM grants: asked for without being named, promised to the ranks, refused when there are none."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.beton.synthetic import generate
from data_pipeline.core.schema import dump_yaml
from launcher.runs.records import Records
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import config, logs, wait_for, wait_until_final
from tests.support import ROOT, mokd

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the headline's data where its configuration says, but few and small images."""
    folder = tmp_path_factory.mktemp("headline")
    home = folder / "data" / "imagenet"
    generate(folder / "images", classes=4, per_class_train=64, per_class_test=8, size_px=40)
    home.mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "val")):
        convert([folder / "images" / split], home / f"{name}.beton", ConvertOptions(workers=1))
    shutil.rmtree(folder / "images")
    return folder


def headline(folder: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """What `make launch CONFIG=vit_s_resnet50.yaml NODES=4` runs, in a user's working directory."""
    line = ["make", "-n", "launch", "CONFIG=vit_s_resnet50.yaml", "NODES=4"]
    # not as a part of the `make test` that may have started this
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    done = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    recipe = done.stdout.splitlines()[-1]
    program, *arguments = shlex.split(recipe)
    assert program.endswith("/bin/mokd")
    return mokd(*arguments, *options, cwd=folder, XDG_CONFIG_HOME=str(folder))


def test_the_headline_command_asks_for_all_gpus_of_four_nodes(cluster: Cluster, workplace: Path) -> None:
    plan = headline(workplace, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=4", "#SBATCH --ntasks-per-node=4"} <= set(
        plan.stdout.splitlines()
    )
    assert "4 nodes x 4 GPUs (partition low), 4 cores per GPU, 16 images per GPU and step" in plan.stderr
    assert not (workplace / "runs").exists()


@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the granted GPUs would be real ones")
@pytest.mark.parametrize(
    ("gpus", "options"),
    # 16 ranks that import torch at once take minutes and 16 GB of a machine with two cores
    [pytest.param(4, [], marks=pytest.mark.slow), (1, ["--gpus-per-node", "1"])],
)
def test_the_headline_job_gets_them_and_ends_in_one_line_where_none_can_be_used(
    cluster: Cluster, workplace: Path, gpus: int, options: list[str]
) -> None:
    """Ranks on links to /dev/null. Each of them was granted a GPU by the daemons, and torch finds none."""
    shutil.rmtree(workplace / "runs", ignore_errors=True)
    launched = headline(workplace, *options)
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(workplace / "runs" / "vit_s_resnet50")
    job = Records(run).last_launch()
    assert job is not None
    status = wait_until_final(run, 600)
    assert status.state == "failed", logs(run)
    assert f"{gpus} GPU{'s were' if gpus > 1 else ' was'} promised here, but rank" in (status.reason or "")
    assert "\n" not in (status.reason or "")
    assert [ending.kind for ending in Records(run).endings()] == ["user error"]
    # however far the other ranks have come by then
    assert "error: " in logs(run)
    assert "Traceback" not in logs(run)
    # not requeued: SLURM knows the job as ended, once its processes have left, after one start
    shown = wait_for(
        "SLURM to end the job",
        lambda: "JobState=FAILED" in (told := cluster.run("scontrol", "show", "job", job.job_id)) and told,
        60,
    )
    asked = {"NumNodes=4", f"NumTasks={4 * gpus}", f"TresPerNode=gres:gpu:{gpus}"}
    assert {*asked, "Restarts=0"} <= set(shown.split())


def test_the_doctor_on_every_node_of_an_allocation(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(config(beton, "small")))
    arguments = ["launch", small, "--nodes", "2", "--check", "--json", "--root", tmp_path / "runs"]
    healthy = mokd(*arguments, XDG_CONFIG_HOME=str(tmp_path))
    report = json.loads(healthy.stdout)
    problems = [f for node in report["nodes"] for f in node["findings"] if f["level"] == "problem"]
    assert (healthy.returncode, report["ok"], problems) == (0, True, [])
    assert [node["node"] for node in report["nodes"]] == ["n1", "n2"]
    assert "2 nodes x 1 ranks on CPUs" in healthy.stderr
    assert not (tmp_path / "runs" / "small").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the granted GPUs would be real ones")
def test_the_doctor_names_what_is_wrong_on_a_node(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    """GPUs that SLURM grants and torch cannot use, and data that the nodes do not see."""
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(config(beton, "small", **{"parallel.device": "auto"})))
    arguments = ["launch", small, "--nodes", "2", "--check", "--root", tmp_path]
    found = mokd(*arguments, f"data.train={tmp_path}/gone.beton", "--json", XDG_CONFIG_HOME=str(tmp_path))
    assert found.returncode == 2
    report = json.loads(found.stdout)
    for node in report["nodes"]:
        problems = {f["check"]: f for f in node["findings"] if f["level"] == "problem"}
        assert problems.keys() == {"gpus", "data"}, problems
        assert problems["gpus"]["message"].startswith("4 promised, none usable: ")
        assert problems["gpus"]["mend"]
        assert "gone.beton" in problems["data"]["message"]
    told = mokd(*arguments, XDG_CONFIG_HOME=str(tmp_path))
    assert told.returncode == 2
    assert [line.split(":")[0] for line in told.stdout.splitlines() if line.startswith("n")] == ["n1", "n2"]
    assert "mend with: " in told.stdout


def test_a_cluster_without_gpus(start_cluster: Callable[..., Cluster], beton: Path, tmp_path: Path) -> None:
    start_cluster(gpus=0)
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(config(beton, "small", **{"parallel.device": "auto"})))
    arguments = ["launch", small, "--dry-run", "--root", tmp_path]
    refused = mokd(*arguments, XDG_CONFIG_HOME=str(tmp_path))
    assert refused.returncode == 2
    assert "no partition of this cluster has GPUs" in refused.stderr
    assert mokd(*arguments, "--partition", "low", XDG_CONFIG_HOME=str(tmp_path)).returncode == 0
