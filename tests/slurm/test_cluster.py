"""The one-machine cluster itself."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.cluster import Cluster
from tests.slurm import harness

pytestmark = pytest.mark.slurm


def test_four_nodes_answer(cluster: Cluster) -> None:
    assert sorted(cluster.run("srun", "-N4", "printenv", "SLURMD_NODENAME").split()) == ["n1", "n2", "n3", "n4"]


def test_up_twice_keeps_the_daemons(start_cluster: Callable[..., Cluster]) -> None:
    first = start_cluster()
    before = {name: first.pid(name) for name in ("munged", "slurmctld", "n1", "n4")}
    again = start_cluster()
    assert {name: again.pid(name) for name in before} == before


def test_down_stops_its_own_and_nothing_else(tmp_path: Path) -> None:
    """Another cluster beside the tests' one comes and goes; a process of somebody else's stays."""
    command = [sys.executable, str(harness.ROOT / "slurm" / "cluster.py")]
    other = ["--state", str(tmp_path / "s"), "--nodes", "2", "--port", "18917"]
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        subprocess.run([*command, "up", *other], check=True, timeout=100)
        found = Cluster(tmp_path / "s")
        assert len(found.run("srun", "-N2", "hostname").split()) == 2
        pids = [found.pid(name) for name in ("munged", "slurmctld", "n1", "n2")]
        subprocess.run([*command, "down", "--state", str(tmp_path / "s")], check=True, timeout=100)
        for pid in pids:
            assert not alive(pid)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
