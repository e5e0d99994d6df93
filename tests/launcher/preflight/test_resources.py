from __future__ import annotations

import pytest

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig
from launcher.preflight.resources import fit
from launcher.slurm.cluster_discovery import count_gpus, parse

MIXED = parse(
    "cpu*|up|infinite|(null)|64|256000|10\n"
    "gpu|up|8:00:00|gpu:a100:4(S:0-1)|48|512000|8\n"
    "gpu|up|8:00:00|gpu:h100:8(S:0-1)|128+|1024000+|2\n"
    "old|down|infinite|gpu:16|16|64000|4"
)


def test_gres() -> None:
    texts = ("gpu:4", "gpu:a100:8(S:0-1),nvme:1", "gpu:1,gpu:h100:2", "(null)", "gpu:tesla")
    assert [count_gpus(text) for text in texts] == [4, 8, 3, 0, 1]


def test_all_gpus_of_enough_nodes() -> None:
    found = fit(ClusterConfig(nodes=4), "auto", MIXED)
    assert (found.partition, found.gpus_per_node, found.cpus_per_task, found.time) == ("gpu", 4, 12, "8:00:00")
    assert found.sbatch["mem"] == 0
    assert fit(ClusterConfig(nodes=2), "auto", MIXED).gpus_per_node == 8


def test_a_part_of_a_node_gets_its_share() -> None:
    found = fit(ClusterConfig(nodes=4, gpus_per_node=1), "auto", MIXED)
    assert (found.cpus_per_task, found.sbatch["mem"]) == (12, "128000M")


def test_cpus_only_when_said() -> None:
    assert fit(ClusterConfig(), "cpu", MIXED).gpus_per_node == 0
    assert fit(ClusterConfig(partition="cpu"), "auto", MIXED).cpus_per_task == 64
    only_cpus = parse("cpu*|up|infinite|(null)|64|256000|10")
    for cluster, device, partitions, message in (
        (ClusterConfig(), "auto", only_cpus, "no partition of this cluster has GPUs .*parallel.device=cpu"),
        (ClusterConfig(partition="cpu"), "cuda", MIXED, "partition cpu has no GPUs"),
        (ClusterConfig(partition="gpu", gpus_per_node=0), "auto", MIXED, "partition gpu has GPUs"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            fit(cluster, device, partitions)
        assert "\n" not in str(caught.value)
