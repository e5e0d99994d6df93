from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from data_pipeline.core.imports import resting_collector
from tests.support import ROOT


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_the_collector_rests_within_and_leaves_alone_what_was_made() -> None:
    before = gc.get_freeze_count()
    with resting_collector():
        assert not gc.isenabled()
        kept = [[i] for i in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_it_comes_back_after_a_failed_import_and_stays_off_where_it_was_off() -> None:
    with pytest.raises(ImportError), resting_collector():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with resting_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_rank_starts_with_it_on_again() -> None:
    program = "import gc, mokd.training.entry; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
