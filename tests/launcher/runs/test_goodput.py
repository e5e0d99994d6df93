import json
from pathlib import Path

import pytest

from launcher.runs.goodput import goodput
from launcher.runs.records import Ending, Records
from mokd.runs.metrics import MetricsWriter
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config


def log(run: RunDirectory, attempt: int, resumed: int, steps: range, **more: float) -> None:
    """Logs steps of 10 images at 5 images a second, after those up to `resumed`."""
    metrics = MetricsWriter(run, attempt, resumed)
    for step in steps:
        metrics.write({"step": step, "images_seen": 10 * step, "images_per_second": 5.0, **more})
    metrics.close()


def phases(run: RunDirectory, attempt: int, *moments: tuple[float, str, int]) -> None:
    file = run.path / "attempts" / f"{attempt:04d}" / "phases.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(dict(zip(("time", "phase", "step"), m, strict=True))) + "\n" for m in moments))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An attempt of 60 s that lost 3 of 10 steps, 30 s in the queue, and one of 50 s that goes on from step 7 to 12."""
    run, t = RunDirectory(tmp_path), 1000.0
    records = Records(run)
    run.claim_attempt({"launch": 1, "time": t, "step": 0})
    log(run, 1, 0, range(1, 11))
    phases(run, 1, (t + 4.0, "start", 0), (t + 20.0, "step", 0), (t + 44.0, "save", 10), (t + 45.0, "step", 10))
    times = {"started": t, "ended": t + 60.0}
    records.write_ending(Ending(1, 1, "requeued", "failure", "", 7, first_step=0, last_step=10, **times))
    run.claim_attempt({"launch": 1, "time": t + 90.0, "step": 7})
    log(run, 2, 7, range(8, 13), save_stall_seconds=0.5)
    run.write_status("running", 2, step=12)
    return run


def test_where_the_time_went(run: RunDirectory) -> None:
    found = goodput(run, now=1140.0)
    assert (found.allocated_seconds, found.queued_seconds, found.steps_lost) == (110.0, 30.0, 3)
    # 12 steps of 2 s, less what five saves took
    assert found.useful_seconds == pytest.approx(12 * 2.0 - 5 * 0.5)
    assert found.useful_fraction == pytest.approx(21.5 / 110.0)
    assert found.effective_training_time_ratio == pytest.approx(21.5 / 140.0)
    assert found.lost_seconds == pytest.approx(3 * 21.5 / 12)
    first, second = found.attempts
    assert first.phases == {"start": 20.0, "step": 39.0, "save": 1.0}
    assert (second.first_step, second.last_step, second.steps_lost) == (7, 12, 0)
    assert (
        found.line()
        == "20% of 1m50s allocated was training; 3 steps trained twice; 1 restart: queued 30s, steps again 5s"
    )


def test_the_parts_of_a_start_and_what_came_before_the_attempts_number(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", tiny_config())
    run.claim_attempt({"time": 1010.0})
    lines = [
        {"time": 1000.0, "phase": "start", "part": "imports", "step": 0},
        {"time": 1008.0, "phase": "start", "part": "process group", "step": 0},
        {"time": 1012.0, "phase": "start", "step": 0},
        {"time": 1013.0, "phase": "start", "part": "first step", "step": 0},
        {"time": 1015.0, "phase": "step", "step": 1},
    ]
    file = run.phases_file(1)
    file.parent.mkdir()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_status("running", 1, step=1)
    (found,) = goodput(run, now=1020.0).attempts
    assert found.parts == {"imports": 8.0, "process group": 4.0, "first step": 2.0}
    # the attempt itself began at 1010
    assert found.phases == {"start": 5.0, "step": 5.0}


def test_a_finished_attempt_without_a_supervisor_ends_with_its_mark(run: RunDirectory) -> None:
    run.write_status("done", 2, step=12)
    ended = run.read_status()["time"]
    assert goodput(run, now=ended + 1000.0).attempts[-1].ended == ended


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    found = goodput(RunDirectory(tmp_path))
    assert (found.attempts, found.useful_fraction, found.effective_training_time_ratio) == ([], 0.0, 0.0)
