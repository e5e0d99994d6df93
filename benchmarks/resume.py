"""How long training stands still for a save, and how long a resumed run takes to its first step."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mokd.config import RunConfig
from mokd.run_directory import EXIT_DONE, RunDirectory

SAVES = 5
STEPS = 2


def run(config: RunConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures one rank of `config` on this machine.

    `sync` is a whole save: copy to host memory, write, fsync, rename. `async` is the copy alone, which is what a save
    in the background leaves of it. `first_step_seconds` runs from the start of the process to the end of the first step
    after the checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="mokd-bench-") as folder:
        say(f"training {STEPS} steps, then {SAVES} saves")
        directory = RunDirectory.create(Path(folder) / "run", _changed(config, STEPS))
        saves = _save_times(directory)
        say("resuming")
        first_step = _first_step_seconds(directory, config)
        newest = directory.checkpoints / f"step-{STEPS}"
        size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "save_stall_seconds": {name: round(statistics.median(times), 4) for name, times in saves.items()},
        "first_step_seconds": round(first_step, 2),
        "checkpoint_bytes": size,
    }


def _changed(config: RunConfig, steps: int) -> RunConfig:
    logging = config.logging.model_copy(update={"every_steps": 1, "tensorboard": False})
    evaluation = config.evaluation.model_copy(update={"every_epochs": None})
    optim = config.optim.model_copy(update={"max_steps": steps})
    return config.model_copy(update={"logging": logging, "evaluation": evaluation, "optim": optim})


def _save_times(directory: RunDirectory) -> dict[str, list[float]]:
    from mokd import checkpoint, state
    from mokd.distributed import Ranks, pick_device
    from mokd.stopping import StopRequest
    from mokd.trainer import Trainer

    ranks, attempt = Ranks(), directory.claim_attempt()
    trainer = Trainer(directory, directory.config(), ranks, pick_device(ranks), StopRequest(), attempt)
    trainer.fit()
    times: dict[str, list[float]] = {"sync": [], "async": []}
    for number in range(SAVES):
        began = time.perf_counter()
        snapshot = state.collect(trainer.branches, trainer.objective)
        times["async"].append(time.perf_counter() - began)
        beside = RunDirectory(directory.path.with_name(f"save-{number}"))
        beside.path.mkdir()
        own = beside.claim_attempt()
        checkpoint.publish(beside, own, STEPS, snapshot, {"identity": trainer.identity})
        times["sync"].append(time.perf_counter() - began)
    return times


def _first_step_seconds(directory: RunDirectory, config: RunConfig) -> float:
    from data_pipeline.schema import dump_yaml

    directory.config_file.write_text(dump_yaml(_changed(config, STEPS + 1)))
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_STEP_ID")}
    began = time.time()
    command = [sys.executable, "-m", "mokd.train", str(directory.path)]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not _has_step(directory, STEPS + 1):
            if process.poll() not in (None, EXIT_DONE):
                assert process.stderr is not None
                raise RuntimeError(process.stderr.read().decode(errors="replace").strip().splitlines()[-1])
            time.sleep(0.01)
        return time.time() - began
    finally:
        process.communicate()


def _has_step(directory: RunDirectory, step: int) -> bool:
    try:
        lines = directory.metrics_file.read_text(encoding="utf-8").splitlines()
        return any(json.loads(line).get("step", 0) >= step for line in lines[-2:])
    except (OSError, ValueError):
        return False
