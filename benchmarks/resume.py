"""How long training stands still for a save, and how long a resumed run takes to its first step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import dump_yaml
from mokd.config import RunConfig
from mokd.runs import environment
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory

SAVES, EVERY = 6, 3  # measured saves, and steps between two
STEPS = (SAVES + 1) * EVERY  # the last save is waited for, in either mode, and does not count


def run(config: RunConfig, folder: Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains one rank of `config` for real, twice, and resumes it. `folder` is where checkpoints go.

    save_stall_seconds: the median time between two steps that a save has taken, written in the loop (sync) and by a
    thread (async). Training is as it is: with a thread still busy at the next save, that one waits for it.
    first_step_seconds: from the start of the process to the end of the first step after the checkpoint.
    checkpoint_bytes: all files of one.
    """
    with tempfile.TemporaryDirectory(prefix="mokd-bench-", dir=folder) as scratch:
        stalls, runs = {}, {}
        for name, asynchronous in (("sync", False), ("async", True)):
            say(f"{STEPS} steps, a save every {EVERY}: {name}")
            runs[name] = RunDirectory.create(Path(scratch) / name, _changed(config, STEPS, asynchronous))
            _train(runs[name])
            stalls[name] = [r["save_stall_seconds"] for r in read_metrics(runs[name].metrics_file) if _stood_still(r)]
        say("resuming")
        first_step = _first_step_seconds(runs["async"], config)
        newest = runs["sync"].checkpoints / f"step-{STEPS}"
        size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "save_stall_seconds": {name: round(statistics.median(times), 4) for name, times in stalls.items()},
        "first_step_seconds": round(first_step, 2),
        "checkpoint_bytes": size,
        "measurements": {name: [round(seconds, 4) for seconds in times] for name, times in stalls.items()},
        "machine": {**environment.describe(), "command": ["mokd", *sys.argv[1:]]},
    }


def _stood_still(record: dict[str, Any]) -> bool:
    return "save_stall_seconds" in record


def _changed(config: RunConfig, steps: int, asynchronous: bool) -> RunConfig:
    sections = {
        "logging": {"every_steps": 1, "tensorboard": False},
        "optim": {"max_steps": steps, "epochs": max(config.optim.epochs, STEPS + 1)},
        "checkpoint": {"every_steps": EVERY, "asynchronous": asynchronous, "keep_last": 1},
    }
    changed = {name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    return config.model_copy(update=changed)


def _start(directory: RunDirectory) -> subprocess.Popen[bytes]:
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_STEP_ID")}
    command = [sys.executable, "-m", "mokd.training.entry", str(directory.path)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _train(directory: RunDirectory) -> None:
    process = _start(directory)
    _, errors = process.communicate()
    if process.returncode != EXIT_DONE:
        raise RuntimeError(errors.decode(errors="replace").strip().splitlines()[-1])


def _first_step_seconds(directory: RunDirectory, config: RunConfig) -> float:
    directory.config_file.write_text(dump_yaml(_changed(config, STEPS + 1, True)))
    began = time.time()
    process = _start(directory)
    try:
        while read_metrics(directory.metrics_file)[-1]["step"] <= STEPS:
            if process.poll() not in (None, EXIT_DONE):
                assert process.stderr is not None
                raise RuntimeError(process.stderr.read().decode(errors="replace").strip().splitlines()[-1])
            time.sleep(0.01)
        return time.time() - began
    finally:
        process.communicate()
