"""A checkpoint that somebody reads is not lost to pruning."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from mokd.checkpointing import storage
from mokd.checkpointing.hold import newest_held, open_held
from mokd.runs.run_directory import RunDirectory
from tests.mokd.checkpointing.test_checkpoint import SNAPSHOT
from tests.support import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run", tiny_config())
    directory.claim_attempt()
    return directory


def save(run: RunDirectory, step: int) -> None:
    assert storage.publish(run, 1, step, SNAPSHOT, {"identity": {}})
    storage.prune(run, step, 1, None)


def test_it_can_be_read_after_it_was_pruned_and_is_gone_afterwards(run: RunDirectory) -> None:
    save(run, 1)
    with newest_held(run) as found:
        save(run, 2)
        assert not storage.step_directory(run, 1).exists()
        elsewhere = open_held(found.path)  # as another rank does
        assert (elsewhere.step, elsewhere.checksums) == (1, found.checksums)
        assert elsewhere.tensors("branch-a").keys() == SNAPSHOT["branch-a"].keys()
    assert list(run.evaluations.iterdir()) == []


def test_a_live_run_that_prunes_all_the_time_never_takes_one_away(run: RunDirectory) -> None:
    save(run, 1)
    enough = threading.Event()

    def train() -> None:
        step = 1
        while not enough.is_set():
            step += 1
            save(run, step)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        seen = []
        for _ in range(30):
            with newest_held(run) as found:
                assert all(found.tensors(name) for name in SNAPSHOT)
                seen.append(found.step)
        assert seen == sorted(seen)
    finally:
        enough.set()
        trainer.join()


def test_damaged_ones_are_passed_over(run: RunDirectory) -> None:
    for step in (1, 2):
        assert storage.publish(run, 1, step, SNAPSHOT, {"identity": {}})
    (storage.step_directory(run, 2) / "objective.safetensors").write_bytes(b"")
    with newest_held(run) as found:
        assert found.step == 1
    (storage.step_directory(run, 1) / "objective.safetensors").unlink()
    with pytest.raises(UserError, match="has no complete checkpoint yet"), newest_held(run):
        pass
    assert len(storage.step_directories(run)) == 2  # a reader changes nothing
