"""`mokd resume` by the command line, with the real trainer as a job of this machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_pipeline.core.schema import dump_yaml
from mokd.checkpointing import storage
from mokd.runs.files import read_json
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from tests.support import mokd, tiny_config

STEPS = 6


def wait_until_over(run: RunDirectory, attempt: int) -> None:
    """Until an attempt has ended well and its processes have left."""
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        mark = run.read_status()
        assert mark.get("state") != "failed", mark
        if (mark.get("state"), mark.get("attempt")) == ("done", attempt):
            return
        time.sleep(0.1)
    raise AssertionError(f"not done within two minutes: {run.read_status()}")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def logged(file: Path) -> list[int]:
    return [record["step"] for record in read_metrics(file)]


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("resume")
    config = folder / "tiny.yaml"
    changes = {"optim__max_steps": STEPS, "checkpoint__every_steps": 2, "checkpoint__keep_last": 10}
    config.write_text(dump_yaml(tiny_config(beton, **changes)))
    launched = mokd("launch", config, "--local", "--root", folder / "runs")
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(folder / "runs" / "tiny")
    wait_until_over(run, 1)
    return run


def test_from_an_older_step_with_another_rate_and_from_the_beginning(run: RunDirectory) -> None:
    assert checkpoints(run.checkpoints) == ["step-2", "step-4", "step-6"]
    first = read_metrics(run.metrics_file)

    done = mokd("resume", run.path, "--local")
    assert (done.returncode, "is done; there is nothing to resume" in done.stderr) == (2, True)
    missing = mokd("resume", run.path, "--local", "--from-step", "3")
    assert (missing.returncode, "has checkpoints of steps 2, 4, 6" in missing.stderr) == (2, True)
    fixed = mokd("resume", run.path, "--local", "--from-step", "2", "seed=4")
    assert (fixed.returncode, "seed is 4 now and was 3" in fixed.stderr) == (2, True)
    assert read_metrics(run.metrics_file) == first
    assert checkpoints(run.checkpoints) == ["step-2", "step-4", "step-6"]

    resumed = mokd("resume", run.path, "--local", "--from-step", "2", "branches.vit.optimizer.lr=0.0007")
    assert resumed.returncode == 0, resumed.stderr
    wait_until_over(run, 2)
    assert checkpoints(run.path / "before-rewind-1") == ["step-4", "step-6"]
    assert read_metrics(run.path / "before-rewind-1" / "metrics.jsonl") == first
    (change,) = read_metrics(run.changes_file)
    assert (change["step"], change["key"]) == (2, "branches.1.optimizer.lr")
    assert (change["before"], change["after"]) == (0.003, 0.0007)
    second = read_metrics(run.metrics_file)
    assert logged(run.metrics_file) == list(range(1, STEPS + 1))
    assert second[:2] == first[:2]
    assert second[2]["lr/vit"] != first[2]["lr/vit"]
    assert second[2]["lr/resnet"] == first[2]["lr/resnet"]
    shown = mokd("status", run.path)
    assert "branches.1.optimizer.lr: 0.003 -> 0.0007" in shown.stdout, shown.stdout

    restarted = mokd("resume", run.path, "--local", "--restart")
    assert restarted.returncode == 0, restarted.stderr
    assert str(run.path / "before-restart-1") in restarted.stderr.replace("\n", "")
    wait_until_over(run, 3)
    kept = run.path / "before-restart-1"
    assert read_metrics(kept / "metrics.jsonl") == second
    assert checkpoints(kept / "checkpoints") == ["step-2", "step-4", "step-6"]
    assert (kept / "changes.jsonl").exists()
    assert not run.changes_file.exists()
    assert logged(run.metrics_file) == list(range(1, STEPS + 1))
    # with the rate of the configuration as it was changed
    assert read_metrics(run.metrics_file)[2]["lr/vit"] == second[2]["lr/vit"]
    assert (read_json(storage.step_directory(run, STEPS) / "state.json") or {})["attempt"] == 3
