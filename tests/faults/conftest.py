from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import Cluster
from tests.slurm import harness
from tests.slurm.conftest import _daemons, beton, cluster, start_cluster  # noqa: F401 - fixtures


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(number): proves a row of the fault table")


@pytest.fixture(scope="session")
def undisturbed(_daemons: Cluster, beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    """A run that nothing happened to: two ranks on two nodes, 24 steps."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(_daemons.conf))
    patch.setenv("PYTHONPATH", str(harness.ROOT))
    _daemons.up(harness.options())
    run = harness.train(harness.config(beton, "undisturbed"), tmp_path_factory.mktemp("undisturbed"))
    status = harness.wait_until_final(run)
    assert status.state == "done", harness.logs(run)
    patch.undo()
    return run
