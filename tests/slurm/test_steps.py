"""The steps of a job array's tasks, as the supervisor finds and ends them."""

import pytest

from launcher.slurm import client
from slurm.cluster import Cluster
from tests.slurm.harness import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


def test_one_task_of_an_array_is_ended(cluster: Cluster) -> None:
    """All tasks, the last one too, whose plain id is the array's own."""
    script = ["--array=0-2", "-o", "/dev/null", "--wrap", "srun sleep 600"]
    array = cluster.run("sbatch", "--parsable", *script).strip()
    tasks = [f"{array}_{index}" for index in range(3)]
    wait_for("the steps", lambda: all(client.steps(task) for task in tasks))
    assert [client.steps(task) for task in tasks] == [[f"{task}.0"] for task in tasks]
    left = list(tasks)
    for task in (tasks[1], tasks[2]):
        client.signal_step(client.steps(task)[0], "KILL")
        left.remove(task)
        wait_for("the step's end", lambda task=task: not client.steps(task))
        assert all(client.steps(other) for other in left)
