from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory
from data_pipeline.core.errors import DataError, UserError
from mokd.config import RunConfig, load_config
from tests.support import ROOT

SMALL = ["objective.prototypes=64", "branches.0.mlp_head.hidden=16", "branches.1.mlp_head.hidden=16"]


def small(*overrides: str) -> RunConfig:
    return load_config(Path(ROOT) / "benchmarks" / "step.yaml", [*SMALL, *overrides])


@pytest.mark.parametrize(("limit", "largest"), [(100 + 10 * 2, 2), (100 + 10 * 7, 7), (100 + 10 * 9 + 5, 9)])
def test_the_search_ends_at_the_largest_batch_that_fits(
    limit: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def peak(config: RunConfig, batch: int, limit_mb: float) -> float | None:
        tried.append(batch)
        used = 100.0 + 10.0 * batch
        return used if used < 2 * limit_mb else None

    monkeypatch.setattr(memory, "_peak_mb", peak)
    result = memory.run(small(), limit, lambda line: None)
    assert result["largest_batch"] == largest
    assert result["peak_mb"] == 100.0 + 10.0 * largest
    assert len(set(tried)) == len(tried)


def test_a_real_trial_is_within_the_limit_or_refused() -> None:
    peak = memory._peak_mb(small(), 2, 20_000.0)
    assert peak is not None
    assert 1.0 < peak < 20_000.0
    with pytest.raises(UserError, match="not even a batch of 2"):
        memory.run(small(), 1.0, lambda line: None)


def test_a_step_that_fails_for_another_reason_says_why() -> None:
    broken = small("branches.0.backbone=no_such_network")
    with pytest.raises(DataError, match="no_such_network"):
        memory._peak_mb(broken, 2, 20_000.0)
