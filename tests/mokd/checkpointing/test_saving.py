from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mokd.checkpointing import choose, storage
from mokd.checkpointing.async_writer import AsyncCheckpointer
from mokd.checkpointing.crash_points import VARIABLE
from mokd.config import CheckpointConfig
from mokd.runs.run_directory import RunDirectory, StaleAttemptError
from tests.mokd.checkpointing.test_checkpoint import SNAPSHOT
from tests.support import ROOT, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run", tiny_config())
    directory.claim_attempt()
    return directory


def published_steps(run: RunDirectory) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.checkpoints.glob("step-*"))


def test_training_goes_on_while_a_thread_writes_one_save_at_a_time(run: RunDirectory) -> None:
    may_write, told = threading.Event(), []
    checkpointer = AsyncCheckpointer(run, 1, CheckpointConfig(), lambda: may_write.wait() and None, told.append)
    checkpointer.save(1, SNAPSHOT, {"identity": {}})
    assert published_steps(run) == told == []  # save has returned, nothing is written yet
    second = threading.Thread(target=checkpointer.save, args=(2, SNAPSHOT, {"identity": {}}))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it waits for the first
    may_write.set()
    second.join()
    assert checkpointer.wait()
    assert published_steps(run) == told == [1, 2]


def test_a_step_is_reported_once_it_can_be_resumed_from(run: RunDirectory) -> None:
    found = []
    checkpointer = AsyncCheckpointer(
        run, 1, CheckpointConfig(), lambda: None, lambda step: found.append(choose.newest(run).step)
    )  # type: ignore[union-attr]
    for step in (3, 4):
        checkpointer.save(step, SNAPSHOT, {"identity": {}})
    assert checkpointer.wait()
    assert found == [3, 4]


def test_without_a_thread_a_save_is_done_when_it_returns(run: RunDirectory) -> None:
    checkpointer = AsyncCheckpointer(
        run, 1, CheckpointConfig(asynchronous=False, keep_last=1), lambda: None, lambda step: None
    )
    for step in (1, 2):
        checkpointer.save(step, SNAPSHOT, {"identity": {}})
        assert published_steps(run) == [step]


def test_a_leftover_attempt_hears_that_it_is_one(run: RunDirectory) -> None:
    checkpointer = AsyncCheckpointer(run, 1, CheckpointConfig(), lambda: None, lambda step: None)
    run.claim_attempt()
    checkpointer.save(1, SNAPSHOT, {"identity": {}})
    with pytest.raises(StaleAttemptError, match="attempt 2 has taken over"):
        checkpointer.wait()
    assert published_steps(run) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_told_and_the_next_save_may_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a tmpfs here")
    try:
        run = RunDirectory.create(small / "run", tiny_config())
        run.claim_attempt()
        told: list[int] = []
        checkpointer = AsyncCheckpointer(run, 1, CheckpointConfig(), lambda: None, told.append)
        checkpointer.save(1, {"branch-a": {"student.w": torch.zeros(1024, 1024)}}, {"identity": {}})
        assert not checkpointer.wait()
        assert "DISK FULL" in caplog.text
        checkpointer.save(2, SNAPSHOT, {"identity": {}})
        assert checkpointer.wait()
        assert told == [2]
    finally:
        subprocess.run(["umount", str(small)], check=True)


SAVER = """
import sys, time
from pathlib import Path
from mokd.config import CheckpointConfig
from mokd.runs.run_directory import RunDirectory
from mokd.checkpointing.async_writer import AsyncCheckpointer
from tests.mokd.checkpointing.test_checkpoint import SNAPSHOT
run = RunDirectory(Path(sys.argv[1]))
checkpointer = AsyncCheckpointer(run, 1, CheckpointConfig(), lambda: None, lambda step: None)
checkpointer.save(int(sys.argv[2]), SNAPSHOT, {"identity": {}})
time.sleep(60)  # training goes on
"""


@pytest.mark.parametrize(("point", "survivor"), [("complete", 1), ("renamed", 2)])
def test_the_process_ends_inside_a_save_in_the_background(run: RunDirectory, point: str, survivor: int) -> None:
    assert storage.publish(run, 1, 1, SNAPSHOT, {"identity": {}})
    command = [sys.executable, "-c", SAVER, str(run.path), "2"]
    cut = subprocess.run(command, cwd=ROOT, env={**os.environ, VARIABLE: point}, check=False)
    assert cut.returncode == 137
    assert choose.newest(run).step == survivor  # type: ignore[union-attr]
