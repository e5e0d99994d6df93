"""GPUs that SLURM grants: asked for without being named, promised to the ranks, refused when there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.core.schema import dump_yaml
from launcher.runs.records import Records
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm.harness import config, logs, wait_until_final
from tests.support import mokd

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_all_gpus_of_four_nodes(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    """The plan of the headline command, its data aside."""
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(config(beton, "small", **{"parallel.device": "auto", "optim.global_batch": 16})))
    plan = mokd(
        "launch", small, "--nodes", "4", "--dry-run", "--root", tmp_path / "runs", XDG_CONFIG_HOME=str(tmp_path)
    )
    assert plan.returncode == 0, plan.stderr
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=4", "#SBATCH --ntasks-per-node=4"} <= set(
        plan.stdout.splitlines()
    )
    assert "4 nodes x 4 GPUs (partition low), 4 cores per GPU, 1 images per GPU and step" in plan.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the granted GPUs would be real ones")
def test_ranks_without_a_usable_gpu_end_the_run(cluster: Cluster, beton: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(config(beton, "small", **{"parallel.device": "auto"})))
    launched = mokd("launch", small, "--gpus-per-node", "1", "--root", tmp_path, XDG_CONFIG_HOME=str(tmp_path))
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(tmp_path / "small")
    status = wait_until_final(run)
    assert status.state == "failed", logs(run)
    assert "1 GPUs were promised here, but rank 0 can use none" in (status.reason or "")
    assert [ending.kind for ending in Records(run).endings()] == ["user error"]


def test_a_cluster_without_gpus(start_cluster: Callable[..., Cluster], beton: Path, tmp_path: Path) -> None:
    start_cluster(gpus=0)
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(config(beton, "small", **{"parallel.device": "auto"})))
    arguments = ["launch", small, "--dry-run", "--root", tmp_path]
    refused = mokd(*arguments, XDG_CONFIG_HOME=str(tmp_path))
    assert refused.returncode == 2
    assert "no partition of this cluster has GPUs" in refused.stderr
    assert mokd(*arguments, "--partition", "low", XDG_CONFIG_HOME=str(tmp_path)).returncode == 0
