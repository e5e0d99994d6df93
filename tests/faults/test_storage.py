"""Faults 8, 15 and 16: a save that is cut off, a full disk, a damaged checkpoint. One rank, no SLURM."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.records import checkpoint_step
from mokd.checkpointing.crash_points import VARIABLE
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.run_directory import RunDirectory
from tests.disks import small_file_system
from tests.slurm.harness import ROOT, Record, config, logged_steps, weights

STEPS, EVERY = 16, 2
CRASHED = 137
# every write, rename and removal of a save, in its order
POINTS = [
    *("created", "wrote objective", "wrote branch-cnn", "wrote branch-vit", "complete"),
    *("renamed", "latest", "prune"),
]


def start(run: RunDirectory, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.run(
        [sys.executable, "-m", "mokd.training.entry", str(run.path)],
        env={**variables, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def resumed_step(shown: str) -> int:
    """The step that a process said it resumed from."""
    match = re.search(r"resumed at step (\d+)", shown)
    assert match, shown
    return int(match[1])


def new_run(beton: Path, path: Path, **changes: Any) -> RunDirectory:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return RunDirectory.create(path, config(beton, path.name, epochs=2, every=EVERY, **changes))


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that nothing happened to."""
    run = new_run(beton, tmp_path_factory.mktemp("whole") / "whole")
    done = start(run)
    assert done.returncode == EXIT_DONE, done.stderr
    return run


@pytest.mark.fault(8)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_cut_off_at_every_point_of_a_save(
    beton: Path, whole: RunDirectory, tmp_path: Path, record_property: Record, asynchronous: bool
) -> None:
    run = new_run(beton, tmp_path / "cut", checkpoint__asynchronous=asynchronous)
    lost, reached = [], 0
    for point in POINTS:
        before = checkpoint_step(run)
        crashed = start(run, **{VARIABLE: point})
        assert crashed.returncode == CRASHED, (point, crashed.stderr)
        reached = max(logged_steps(run))
        assert checkpoint_step(run) in (before, before + EVERY)
        lost.append(reached - checkpoint_step(run))
    done = start(run)
    assert done.returncode == EXIT_DONE, done.stderr
    record_property("lost", max(lost))
    # what is trained while a save is written may go with it; the next save waits for it, so that is less than EVERY
    assert max(lost) <= (2 * EVERY if asynchronous else EVERY)
    assert weights(run) == weights(whole)
    assert logged_steps(run) == list(range(1, STEPS + 1))
    assert not list(run.checkpoints.glob(".*")), "leftovers of the saves that were cut off"


@pytest.mark.fault(16)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_newest_checkpoint(
    beton: Path, whole: RunDirectory, tmp_path: Path, record_property: Record, damage: str
) -> None:
    run = RunDirectory(tmp_path / "damaged")
    shutil.copytree(whole.path, run.path)
    newest = run.checkpoints / f"step-{checkpoint_step(run)}"
    file = newest / "branch-vit.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flip" else content[:-100])
    done = start(run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert f"{newest} is damaged" in done.stderr
    assert f"resumed at step {STEPS - EVERY}" in done.stderr
    lost = max(logged_steps(whole)) - resumed_step(done.stderr)
    record_property("lost", lost)
    assert lost == EVERY
    assert weights(run) == weights(whole)


@pytest.fixture
def small_disk(tmp_path: Path, whole: RunDirectory) -> Iterator[Path]:
    """A file system that holds one checkpoint and a half."""
    size = sum(path.stat().st_size for path in (whole.checkpoints / f"step-{STEPS}").iterdir())
    with small_file_system(tmp_path / "small", f"size={size * 3 // 2}") as folder:
        yield folder


@pytest.mark.fault(15)
@pytest.mark.timeout(600)
def test_disk_full(beton: Path, whole: RunDirectory, tmp_path: Path, small_disk: Path, record_property: Record) -> None:
    run = new_run(beton, tmp_path / "full")
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(small_disk)
    ended = start(run)
    assert max(logged_steps(run)) == STEPS, "training did not go on"
    assert ended.stderr.count("DISK FULL") == STEPS // EVERY - 1
    assert checkpoint_step(run) == EVERY
    # without its last checkpoint a run is not done; with room again it finishes as if nothing had been
    assert ended.returncode != EXIT_DONE
    shutil.copytree(small_disk, tmp_path / "room")
    run.checkpoints.unlink()
    (tmp_path / "room").rename(run.checkpoints)
    done = start(run)
    assert done.returncode == EXIT_DONE, done.stderr
    record_property("lost", STEPS - resumed_step(done.stderr))
    assert weights(run) == weights(whole)


@pytest.mark.fault("tensorboard")
@pytest.mark.timeout(600)
def test_unwritable_tensorboard(beton: Path, whole: RunDirectory, tmp_path: Path) -> None:
    run = new_run(beton, tmp_path / "no-board")
    run.tensorboard.write_text("a file where the directory should be")
    done = start(run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "TensorBoard cannot be written" in done.stderr
    assert weights(run) == weights(whole)


@pytest.mark.fault("beton replaced")
@pytest.mark.timeout(600)
def test_beton_replaced_between_restarts(beton: Path, tmp_path: Path) -> None:
    for path in beton.parent.glob("*.beton*"):
        shutil.copy(path, tmp_path)
    run = new_run(tmp_path / "train.beton", tmp_path / "replaced")
    assert start(run, **{VARIABLE: "latest"}).returncode == CRASHED
    from data_pipeline.beton.convert import ConvertOptions, convert

    for path in tmp_path.glob("train.beton*"):
        path.unlink()
    convert([beton.parent / "images" / "test"], tmp_path / "train.beton", ConvertOptions(workers=1))
    refused = start(run)
    assert refused.returncode not in (EXIT_DONE, CRASHED)
    assert "data" in refused.stderr
