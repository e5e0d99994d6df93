"""Ranks are judged by their progress, each phase by its own limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config import ClusterConfig
from launcher.runs.goodput import goodput
from launcher.slurm.hang_watch import HangWatch
from launcher.slurm.status import read_status
from mokd.distributed.local_ranks import train_locally
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.heartbeat import Heartbeat, read_heartbeats
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config

SHORT: dict[str, Any] = {"hang_timeout_seconds": 2, "evaluate_timeout_seconds": 600, "save_timeout_seconds": 600}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run", tiny_config())
    directory.claim_attempt()
    return directory


@pytest.fixture
def hearts(run: RunDirectory) -> Iterator[list[Heartbeat]]:
    """Two ranks; their main thread is this one."""
    found = [Heartbeat(run, 1, rank) for rank in range(2)]
    yield found
    for heart in found:
        heart.close()


def verdict(watch: HangWatch, seconds: float) -> str | None:
    """The first thing that the watch says within so long."""
    end, found = time.monotonic() + seconds, None
    while found is None and time.monotonic() < end:
        time.sleep(0.2)
        found = watch.hung()
    return found


@pytest.mark.parametrize("phase", ["start", "compile", "evaluate", "save"])
def test_a_phase_longer_than_a_step_may_take_is_no_hang(run: RunDirectory, hearts: list[Heartbeat], phase: Any) -> None:
    for heart in hearts:
        heart.phase(phase, 0)
    assert verdict(HangWatch(run, 1, ClusterConfig(nodes=2, **SHORT)), 4.0) is None


def test_a_rank_whose_main_thread_is_stuck_is_named_though_its_thread_lives(
    run: RunDirectory, hearts: list[Heartbeat]
) -> None:
    hearts[0].phase("step", 8)
    hearts[1].phase("step", 7)
    found = verdict(HangWatch(run, 1, ClusterConfig(nodes=2, **SHORT)), 30.0)
    assert found is not None
    assert found.startswith("hang: rank 1 on ")
    assert found.endswith("without progress for 2 s in phase step, step 7")


def test_a_rank_that_waits_for_one_that_saves_is_not_stuck(run: RunDirectory, hearts: list[Heartbeat]) -> None:
    hearts[0].phase("save", 8)
    hearts[1].phase("step", 8)
    assert verdict(HangWatch(run, 1, ClusterConfig(nodes=2, **SHORT)), 4.0) is None


def test_a_start_is_limited_as_a_whole(run: RunDirectory, hearts: list[Heartbeat]) -> None:
    watch = HangWatch(run, 1, ClusterConfig(nodes=2, startup_timeout_seconds=2))
    end, found = time.monotonic() + 30.0, None
    while found is None and time.monotonic() < end:
        for heart in hearts:
            heart.beat()  # that something happens does not make it a step
        time.sleep(0.2)
        found = watch.hung()
    assert found is not None
    assert "in phase start" in found


def test_ranks_that_never_came_are_counted(run: RunDirectory, hearts: list[Heartbeat]) -> None:
    for heart in hearts:
        heart.phase("evaluate", 0)
    watch = HangWatch(run, 1, ClusterConfig(nodes=4, startup_timeout_seconds=1))
    for _ in hearts:
        time.sleep(1.0)
        found = watch.hung()
    assert found == "hang: 2 ranks without a sign of life 1 s after the start"


def test_the_trainer_says_what_it_does(beton: Path, tmp_path: Path) -> None:
    data = {"evaluation__train": str(beton), "evaluation__test": str(beton.with_name("test.beton"))}
    sizes = {"evaluation__resize_px": 36, "evaluation__crop_px": 32, "evaluation__every_epochs": 2}
    config = tiny_config(beton, optim__max_steps=3, checkpoint__every_steps=2, **data, **sizes)
    run = RunDirectory.create(tmp_path / "run", config)
    assert train_locally(run.path, 2) == EXIT_DONE
    lines = [json.loads(line) for line in run.phases_file(1).read_text().splitlines()]
    phases = [(line["phase"], line["step"]) for line in lines if "part" not in line]
    step = [("step", 1), ("save", 2), ("step", 2), ("save", 3), ("step", 3), ("evaluate", 3), ("step", 3)]
    end = [("save", 3), ("evaluate", 3), ("done", 3)]
    assert phases == [("start", 0), ("evaluate", 0), ("start", 0), *step, *end]
    before = ["imports", "process group", "loader", "networks", "checkpoint", "metrics"]
    assert [line["part"] for line in lines if "part" in line] == [*before, "first batch", "first step"]
    assert goodput(run).attempts[0].parts.keys() == {*before, "first batch", "first step"}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    found = read_heartbeats(run, 1)
    assert [(r["rank"], r["phase"], r["step"]) for r in found] == [(0, "done", 3), (1, "done", 3)]
    assert read_heartbeats(run, 2) == []


def test_status_shows_the_phase_and_the_slowest_rank(run: RunDirectory, hearts: list[Heartbeat]) -> None:
    hearts[0].phase("save", 8)
    hearts[1].phase("step", 7)
    for heart in hearts:
        heart.close()
    found = read_status(run)
    assert found.phase == "save"
    assert found.slowest_rank is not None
    assert (found.slowest_rank["rank"], found.slowest_rank["phase"], found.slowest_rank["step"]) == (1, "step", 7)
