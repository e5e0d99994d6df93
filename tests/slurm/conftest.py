from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import Cluster, ClusterError, install
from tests.slurm import harness


@pytest.fixture(scope="session")
def _daemons() -> Iterator[Cluster]:
    try:
        install()
    except ClusterError as error:
        pytest.skip(str(error))
    found = harness.open_cluster()
    found.down()  # what an interrupted session has left
    yield found
    found.down()


@pytest.fixture
def start_cluster(_daemons: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Brings up the tests' cluster with the given options; afterwards its queue is empty."""
    monkeypatch.setenv("SLURM_CONF", str(_daemons.conf))
    monkeypatch.setenv("PYTHONPATH", str(harness.ROOT))

    def start(**changes: Any) -> Cluster:
        _daemons.up(harness.options(**changes))
        return _daemons

    yield start
    _daemons.clear()


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """The tests' cluster with its usual options."""
    return start_cluster()


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small beton of generated pictures."""
    return harness.make_images(tmp_path_factory.mktemp("images"))
