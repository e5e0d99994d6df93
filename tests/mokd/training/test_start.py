"""A run's directory as `mokd train` makes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import dump_yaml
from mokd.runs.exit_codes import EXIT_STOPPED
from mokd.runs.heartbeat import read_heartbeats
from mokd.runs.run_directory import RunDirectory
from mokd.training.start import first_of_ranks, prepare
from tests.support import ROOT, tiny_config


def test_paths_are_stored_as_the_first_call_means_them(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beton.parent)
    names = {"evaluation__train": "train.beton", "evaluation__test": "test.beton"}
    transfer = {f"evaluation__transfer__{key}": f"{key}.beton" for key in ("train", "test")}
    run = prepare(tiny_config(Path("train.beton"), **names, **transfer), tmp_path, resume=False, world_size=1)
    monkeypatch.chdir(tmp_path)  # a resume comes from elsewhere
    config = run.config()
    test = beton.with_name("test.beton")
    assert config.data.train == beton
    assert (config.evaluation.train, config.evaluation.test) == (beton, test)
    assert (config.evaluation.transfer.train, config.evaluation.transfer.test) == (beton, test)
    # the same words mean the same files there, and other words what they mean from there
    again = prepare(tiny_config(Path("train.beton"), **names, **transfer), tmp_path, resume=True, world_size=1)
    assert again.config() == config
    (tmp_path / "elsewhere.beton").symlink_to(test)
    moved = tiny_config(Path("train.beton"), **names | {"evaluation__test": "elsewhere.beton"}, **transfer)
    assert prepare(moved, tmp_path, resume=True, world_size=1).config().evaluation.test == tmp_path / "elsewhere.beton"


def test_a_run_that_is_being_trained_is_left_alone(beton: Path, tmp_path: Path) -> None:
    config = tiny_config(beton, optim__epochs=1000)
    run = RunDirectory.create(tmp_path / config.name, config)
    rank = subprocess.Popen([sys.executable, "-m", "mokd.training.entry", str(run.path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120.0
        while not read_heartbeats(run, 1) and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(UserError, match=f"process {rank.pid} is training it; end that first"):
            prepare(config, tmp_path, resume=True, world_size=1)
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(120.0) == EXIT_STOPPED
    finally:
        rank.kill()
        rank.wait()
    prepare(config, tmp_path, resume=True, world_size=1)


def test_ranks_of_torchrun_train_together_and_one_speaks(beton: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny_config(beton, optim__max_steps=1)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launcher.cli", "train"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "tiny.yaml"), "--root", str(tmp_path / "runs")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("k-NN % before training") == 1
    assert done.stdout.count("mokd report") == 1


def test_who_is_the_first() -> None:
    assert first_of_ranks({})
    assert first_of_ranks({"SLURM_PROCID": "3"})  # an interactive allocation, without a step
    assert not first_of_ranks({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0"})
    assert not first_of_ranks({"RANK": "1"})


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_a_rank_do_not_spin_unless_they_are_told_to(given: dict[str, str], policy: str) -> None:
    """OpenMP says itself what it has read; it does so once, when torch loads it."""
    around = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    said = subprocess.run(
        [sys.executable, "-c", "import mokd.training.entry"],
        env={**around, **given, "OMP_DISPLAY_ENV": "TRUE"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert f"OMP_WAIT_POLICY = '{policy}'" in said
