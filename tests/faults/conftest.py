from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import Cluster
from tests.slurm import harness
from tests.slurm.conftest import _daemons, beton, cluster, start_cluster  # noqa: F401 - fixtures

# What every change is tested with; `make faults` runs all of them.
EVERY_CHANGE = (
    "test_preemption_with_user_signal",
    "test_killed_rank",
    "test_corrupt_configuration_fails_once",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what is not in the selection."""
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.name.startswith(EVERY_CHANGE):
            item.add_marker(pytest.mark.slow)


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
    harness.finished(run)
    patch.undo()
    return run
