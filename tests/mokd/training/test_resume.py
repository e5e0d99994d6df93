"""A run that is interrupted and resumed equals, bit for bit, the one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.core.schema import dump_yaml
from mokd.distributed.local_ranks import supervise, train_locally
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.runs.run_directory import RunDirectory
from tests.support import CONTRASTIVE, RESNET, ROOT, tiny_config

STEPS = 12  # 5 steps an epoch: the interruption after step 7 lies inside the second epoch


def run_directory(path: Path, beton: Path, **changes: object) -> RunDirectory:
    config = tiny_config(beton, **{"optim__max_steps": STEPS, "checkpoint__keep_last": 10, **changes})
    return RunDirectory.create(path, config)


def final_state(run: RunDirectory) -> dict[str, torch.Tensor]:
    folder = run.checkpoints / f"step-{STEPS}"
    return {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


# the loaders are compared elsewhere: one world size is enough for the reference loader, one objective for each
@pytest.mark.parametrize(
    ("ranks", "changes", "memory"),
    [
        (1, {}, "center"),
        (2, {}, "center"),
        (2, {"parallel__strategy": "fsdp"}, "center"),
        (1, {"data__backend": "torchvision"}, "center"),
        (2, CONTRASTIVE, "bank"),
        (1, {**CONTRASTIVE, "data__backend": "torchvision", "branches": [RESNET]}, "bank"),
    ],
    ids=["ffcv-1", "ffcv-2", "fsdp-2", "torchvision-1", "contrastive-2", "contrastive-solo-torchvision-1"],
)
def test_interrupted_inside_an_epoch_and_resumed_is_bit_identical(
    ranks: int, changes: dict[str, Any], memory: str, beton: Path, tmp_path: Path
) -> None:
    whole = run_directory(tmp_path / "whole", beton, **changes)
    assert train_locally(whole.path, ranks) == EXIT_DONE
    cut = run_directory(tmp_path / "cut", beton, **changes)
    for stop_at in ("5", "7"):
        program = [sys.executable, "-m", "tests.programs.train_until", str(cut.path), stop_at]
        assert supervise(program, ranks) == EXIT_STOPPED
        assert cut.read_status()["state"] == "stopped"
        assert cut.read_status()["step"] == int(stop_at)
    assert train_locally(cut.path, ranks) == EXIT_DONE
    assert cut.read_status()["state"] == "done"

    expected, found = final_state(whole), final_state(cut)
    assert expected.keys() == found.keys()
    parts = {key.split("/")[1].split(".")[0] for key in expected}
    assert {"student", "teacher", "optimizer", memory} <= parts
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert different == []
    # the curves are the same too, every step once
    assert steps(whole) == steps(cut)


def test_checkpoints_go_between_strategies_and_world_sizes(beton: Path, tmp_path: Path) -> None:
    """FSDP on 2 ranks, then one process, hybrid sharding on 4, DDP on 2: in float64 it is the run on one process."""

    def stretch(run: RunDirectory, stop_at: int, ranks: int, **parallel: object) -> None:
        config = tiny_config(beton, optim__max_steps=STEPS, checkpoint__keep_last=10, parallel=parallel)
        run.config_file.write_text(dump_yaml(config))
        program = [sys.executable, "-m", "tests.programs.train_until", str(run.path), str(stop_at), "float64"]
        assert supervise(program, ranks) == (EXIT_DONE if stop_at == STEPS else EXIT_STOPPED)

    whole, moved = run_directory(tmp_path / "whole", beton), run_directory(tmp_path / "moved", beton)
    stretch(whole, STEPS, 1)
    stretch(moved, 4, 2, strategy="fsdp")
    stretch(moved, 7, 1)
    stretch(moved, 10, 4, strategy="fsdp", shard_group_size=2)
    stretch(moved, STEPS, 2, strategy="ddp")
    expected, found = final_state(whole), final_state(moved)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


def steps(run: RunDirectory) -> list[tuple[int, float]]:
    records = map(json.loads, run.metrics_file.read_text().splitlines())
    return [(r["step"], r["loss/resnet/total"]) for r in records if "loss/resnet/total" in r]


def test_sigterm_stops_at_a_step_boundary_and_resume_finishes(beton: Path, tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", beton, optim__epochs=400, optim__max_steps=None)
    command = [
        sys.executable,
        "-c",
        f"from mokd.distributed.local_ranks import *; sys.exit(train_locally(Path({str(run.path)!r}), 2))",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: run.metrics_file.exists() and len(run.metrics_file.read_text().splitlines()) > 3, process)
    for _ in range(5):  # a storm of signals is one request
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_STOPPED
    status = run.read_status()
    assert status["state"] == "stopped"
    assert (run.checkpoints / f"step-{status['step']}").is_dir()
    assert (run.checkpoints / "latest").read_text().strip() == f"step-{status['step']}"


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)
