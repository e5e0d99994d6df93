"""`mokd eval --task linear` says when the best rate lies at an end of the grid."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.cli.evaluate import open_ended

RATES = (0.1, 1.0, 10.0)


def records(best: float, task: str = "linear", branch: str = "vit") -> list[dict[str, Any]]:
    return [{"branch": branch, "task": task, "lr": rate, "headline": rate == best} for rate in RATES]


@pytest.mark.parametrize(("best", "which"), [(0.1, "smallest"), (10.0, "largest")])
def test_the_end_of_the_grid_is_named(best: float, which: str) -> None:
    (line,) = open_ended([*records(best), *records(1.0, branch="resnet")])
    assert line.startswith("vit: ")
    assert which in line
    assert f" {best:g}," in line


def test_nothing_is_said_within_the_grid_or_of_one_rate() -> None:
    assert open_ended(records(1.0)) == []
    assert open_ended(records(10.0)[-1:]) == []
    assert open_ended(records(10.0, task="semi")) == []
