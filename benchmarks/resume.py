"""How long training stands still for a save, and what a stop and a restart cost, part by part."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import dump_yaml
from launcher.runs.goodput import goodput
from mokd.checkpointing.reading import read_checkpoint
from mokd.config import RunConfig
from mokd.runs import environment
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory

SAVES, EVERY = 6, 3  # measured saves, and steps between two
STEPS = (SAVES + 1) * EVERY  # the last save is waited for, in either mode, and does not count
RESTARTS = 5
# more than restarted runs do until they are stopped
SPARE_STEPS = 1000
# after the beginning of an evaluation, when it is asked to stop: while it reads, computes features, compares them
ASKED_AFTER_SECONDS = (0.1, 0.3, 0.6, 1.0, 1.5)
LOOK_SECONDS = 0.005

Say = Callable[[str], None]
Seconds = dict[str, list[float]]


def run(config: RunConfig, folder: Path | None = None, say: Say = print) -> dict[str, Any]:
    """Trains one rank of `config` for real, stops and resumes it. `folder` is where checkpoints go.

    save_stall_seconds: the median time between two steps that a save has taken, written in the loop (sync) and by a
    thread (async). Training is as it is: with a thread still busy at the next save, that one waits for it.
    restart_seconds: medians. `signal to saved` is until the checkpoint is published, `saved to left` until the process
    is gone; the parts of a start as the run itself records them, in which `checkpoint` is what of finding and verifying
    one is left when the networks are built.
    verify_seconds: reading and hashing one checkpoint, alone. first_step_seconds: from the start of the process to the
    end of the first step after the checkpoint. Files are in the page cache, where it has room for them.
    evaluation_stop_seconds: from a signal to the end of an evaluation that it breaks off; empty where `config` does not
    evaluate while training, or where no signal came before an evaluation's end.
    checkpoint_bytes: all files of one.
    """
    with tempfile.TemporaryDirectory(prefix="mokd-bench-", dir=folder) as scratch:
        stalls, runs = {}, {}
        for name, asynchronous in (("sync", False), ("async", True)):
            say(f"{STEPS} steps, a save every {EVERY}: {name}")
            runs[name] = RunDirectory.create(Path(scratch) / name, _changed(config, STEPS, asynchronous))
            _finish(_start(runs[name]), EXIT_DONE)
            stalls[name] = [r["save_stall_seconds"] for r in read_metrics(runs[name].metrics_file) if _stood_still(r)]
        newest = runs["sync"].checkpoints / f"step-{STEPS}"
        size = sum(path.stat().st_size for path in newest.iterdir())
        verify = [_seconds(lambda: read_checkpoint(newest)) for _ in range(RESTARTS)]
        say(f"resuming and stopping, {RESTARTS} times")
        restarts = _restart_seconds(runs["async"], config)
        answers: list[float] = []
        if config.evaluation.every_epochs is not None:
            say(f"stopping {len(ASKED_AFTER_SECONDS)} evaluations")
            answers = _evaluation_stop_seconds(Path(scratch) / "evaluating", config)
    first_step = restarts.pop("first step done")
    return {
        "save_stall_seconds": {name: round(statistics.median(times), 4) for name, times in stalls.items()},
        "first_step_seconds": round(statistics.median(first_step), 2),
        "restart_seconds": {part: round(statistics.median(times), 3) for part, times in restarts.items()},
        "verify_seconds": round(statistics.median(verify), 3),
        "evaluation_stop_seconds": {"median": statistics.median(answers), "max": max(answers)} if answers else {},
        "checkpoint_bytes": size,
        "measurements": {
            **{name: [round(seconds, 4) for seconds in times] for name, times in stalls.items()},
            "first_step": first_step,
            "restart": restarts,
            "verify": verify,
            "evaluation_stop": answers,
        },
        "machine": {**environment.describe(), "command": ["mokd", *sys.argv[1:]]},
    }


def _stood_still(record: dict[str, Any]) -> bool:
    return "save_stall_seconds" in record


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 4)


def _changed(
    config: RunConfig, steps: int, asynchronous: bool, *, every: int = EVERY, evaluate: bool = False
) -> RunConfig:
    sections = {
        "logging": {"every_steps": 1, "tensorboard": False},
        "optim": {"max_steps": steps, "epochs": max(config.optim.epochs, STEPS + SPARE_STEPS)},
        "checkpoint": {"every_steps": every, "asynchronous": asynchronous, "keep_last": 1},
        "evaluation": {"every_epochs": 1 if evaluate else None},
    }
    changed = {name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    return config.model_copy(update=changed)


def _start(directory: RunDirectory) -> subprocess.Popen[bytes]:
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_STEP_ID")}
    command = [sys.executable, "-m", "mokd.training.entry", str(directory.path)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(process: subprocess.Popen[bytes], expected: int) -> None:
    _, errors = process.communicate()
    if process.returncode != expected:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"training ended with status {process.returncode}")


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Until `condition`, or until the process has left."""
    while not condition() and process.poll() is None:
        time.sleep(LOOK_SECONDS)


def _restart_seconds(directory: RunDirectory, config: RunConfig) -> Seconds:
    """Resumes a run and stops it after a step or two, again and again."""
    # no save but the one that the stop asks for
    directory.config_file.write_text(dump_yaml(_changed(config, STEPS + SPARE_STEPS, True, every=10**9)))
    found: Seconds = {"signal to saved": [], "saved to left": [], "first step done": []}
    for _ in range(RESTARTS):
        done, attempt = int(read_metrics(directory.metrics_file)[-1]["step"]), directory.current_attempt() + 1
        began = time.time()
        process = _start(directory)
        try:
            _wait(process, lambda done=done: _last_step(directory) > done)  # type: ignore[misc]
            asked = time.time()
            process.send_signal(signal.SIGTERM)
        finally:
            _finish(process, EXIT_STOPPED)
        left = time.time()
        phases = read_metrics(directory.phases_file(attempt))
        # what follows the last save: the newest checkpoint is published
        saved = next(line["time"] for line in reversed(phases) if line["phase"] == "evaluate")
        stepped = next(line["time"] for line in phases if line["phase"] == "step")
        found["signal to saved"].append(round(saved - asked, 4))
        found["saved to left"].append(round(left - saved, 4))
        found["first step done"].append(round(stepped - began, 4))
        for part, seconds in goodput(directory).attempts[-1].parts.items():
            found.setdefault(part, []).append(round(seconds, 4))
    return found


def _last_step(directory: RunDirectory) -> int:
    return int(read_metrics(directory.metrics_file)[-1]["step"])


def _evaluation_stop_seconds(path: Path, config: RunConfig) -> list[float]:
    """Begins to evaluate untrained networks, and asks to stop: how long each evaluation that was broken off went on."""
    found = []
    for seconds in ASKED_AFTER_SECONDS:
        shutil.rmtree(path, ignore_errors=True)
        directory = RunDirectory.create(path, _changed(config, STEPS, True, evaluate=True))
        process = _start(directory)
        try:
            _wait(process, lambda directory=directory: _evaluating(directory))  # type: ignore[misc]
            time.sleep(seconds)
            asked = time.time()
            process.send_signal(signal.SIGTERM)
        finally:
            _finish(process, EXIT_STOPPED)
        phases = read_metrics(directory.phases_file(1))
        after = phases.index(next(line for line in phases if line["phase"] == "evaluate")) + 1
        if not any("eval/" in key for record in read_metrics(directory.metrics_file) for key in record):
            found.append(round(phases[after]["time"] - asked, 4))
    return found


def _evaluating(directory: RunDirectory) -> bool:
    return any(line["phase"] == "evaluate" for line in read_metrics(directory.phases_file(1)))
