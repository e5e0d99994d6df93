from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mokd.checkpointing import choose, storage
from mokd.checkpointing.crash_points import VARIABLE
from mokd.runs.run_directory import RunDirectory, StaleAttemptError
from tests.support import ROOT, tiny_config

SNAPSHOT = {"objective": {"center": torch.arange(4.0)}, "branch-a": {"student.w": torch.ones(3, 3)}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run", tiny_config())
    directory.claim_attempt()
    return directory


def save(run: RunDirectory, step: int, attempt: int = 1) -> bool:
    return storage.publish(run, attempt, step, SNAPSHOT, {"identity": {}})


def test_what_is_saved_comes_back(run: RunDirectory) -> None:
    assert choose.newest(run) is None
    assert save(run, 7)
    found = choose.newest(run)
    assert found is not None
    assert found.step == 7
    assert torch.equal(found.tensors("branch-a")["student.w"], torch.ones(3, 3))
    assert (run.checkpoints / "latest").read_text() == "step-7\n"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "scalar"])
def test_a_damaged_newest_is_passed_over(run: RunDirectory, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save(run, 1)
    save(run, 2)
    file = storage.step_directory(run, 2) / ("state.json" if damage == "scalar" else "branch-a.safetensors")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    found = choose.newest(run)
    assert found is not None
    assert found.step == 1
    assert "step-2 is damaged" in caplog.text


def test_pruning_keeps_the_last_and_the_multiples(run: RunDirectory) -> None:
    for step in range(1, 9):
        save(run, step)
        storage.prune(run, step, keep_last=2, keep_every=3)
    assert sorted(int(p.name[5:]) for p in run.checkpoints.glob("step-*")) == [3, 6, 7, 8]


def test_a_leftover_attempt_is_refused(run: RunDirectory) -> None:
    assert save(run, 1)
    assert run.claim_attempt() == 2
    with pytest.raises(StaleAttemptError, match="attempt 2 has taken over"):
        save(run, 2, attempt=1)
    with pytest.raises(StaleAttemptError):
        run.write_status("running", 1)
    assert save(run, 3, attempt=2)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-1", "step-3"]


SAVER = """
import sys
from pathlib import Path
from mokd.checkpointing import storage
from mokd.runs.run_directory import RunDirectory
from tests.mokd.checkpointing.test_checkpoint import SNAPSHOT
run = RunDirectory(Path(sys.argv[1]))
storage.publish(run, 1, int(sys.argv[2]), SNAPSHOT, {"identity": {}})
storage.prune(run, int(sys.argv[2]), 1, None)
"""

# every point at which a save or a removal can be cut off, and the step that must be found afterwards
CRASHES = {
    "created": 1,
    "wrote objective": 1,
    "wrote branch-a": 1,
    "complete": 1,
    "renamed": 2,
    "latest": 2,
    "prune": 2,
}


@pytest.mark.parametrize("point", CRASHES)
def test_a_save_cut_off_anywhere_leaves_a_whole_checkpoint(run: RunDirectory, point: str) -> None:
    save(run, 1)
    command = [sys.executable, "-c", SAVER, str(run.path)]
    cut = subprocess.run([*command, "2"], cwd=ROOT, env={**os.environ, VARIABLE: point}, check=False)
    assert cut.returncode == 137
    found = choose.newest(run)
    assert found is not None
    assert found.step == CRASHES[point]
    # and the next save cleans up and works
    assert save(run, 3)
    assert choose.newest(run).step == 3  # type: ignore[union-attr]
    assert not list(run.checkpoints.glob(".step-*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no permission to mount a tmpfs here")
    try:
        run = RunDirectory.create(small / "run", tiny_config())
        run.claim_attempt()
        assert save(run, 1)
        big = {"branch-a": {"student.w": torch.zeros(1024, 1024)}}
        assert storage.publish(run, 1, 2, big, {"identity": {}}) is False
        assert "DISK FULL" in caplog.text
        assert choose.newest(run).step == 1  # type: ignore[union-attr]
        assert not list(run.checkpoints.glob(".step-*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
