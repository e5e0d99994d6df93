"""What happens to the others when a rank is late, or fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mokd.distributed.local_ranks import supervise
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config


def troubled(path: Path, beton: Path, step: int, trouble: str, **timeouts: float) -> tuple[RunDirectory, int]:
    parallel = {f"{key}_seconds": value for key, value in timeouts.items()}
    run = RunDirectory.create(path, tiny_config(beton, optim__max_steps=4, parallel=parallel))
    command = [sys.executable, "-m", "tests.programs.train_troubled", str(run.path), str(step), trouble]
    return run, supervise(command, 2)


def test_a_collective_may_take_longer_at_the_start_than_later(beton: Path, tmp_path: Path) -> None:
    timeouts = {"startup_timeout": 120.0, "timeout": 10.0}
    early, status = troubled(tmp_path / "early", beton, 1, "15", **timeouts)
    assert status == 0
    assert early.read_status()["state"] == "done"
    late, status = troubled(tmp_path / "late", beton, 3, "60", **timeouts)
    assert status == 3
    assert late.read_status()["step"] == 2


def test_a_failing_rank_leaves_its_word_while_the_others_wait(beton: Path, tmp_path: Path) -> None:
    run, status = troubled(tmp_path / "run", beton, 3, "fail")
    assert status == 1
    assert run.read_status()["reason"] == "ValueError: this rank is broken"
    assert json.loads((run.path / "seen.json").read_text()) == {
        "word": "this rank is broken",
        "in_group": True,
        "after": False,
    }


def test_the_word_of_the_first_to_fail_outlives_what_others_still_write(beton: Path, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", tiny_config(beton))
    attempt = run.claim_attempt()
    run.write_failure(attempt, ValueError("this rank is broken"), 1)
    run.write_status("running", attempt, step=3)
    assert run.read_status()["state"] == "failed"
    run.write_failure(attempt, RuntimeError("connection reset by peer"), 0)
    status = run.read_status()
    assert (status["reason"], status["rank"], status["step"]) == ("ValueError: this rank is broken", 1, 3)
    run.write_status("starting", run.claim_attempt())
    assert run.read_status()["state"] == "starting"
