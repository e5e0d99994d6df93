"""What a stop and a restart cost in this checkout and in an older one, in turns on one machine.

usage: python -m benchmarks.restart_against OLDER_CHECKOUT CONFIG [key=value ...] [--rounds N] [--record]

CONFIG is a name in `configs/` of both; the values must be known to both. The native libraries of both must be built in
place. One rank trains, is told to stop by SIGTERM and starts again, as a requeue does it. One JSON object on stdout,
also written to `benchmarks/results/restart.json` with --record. Seconds, medians:

    stop      from SIGTERM until the process has left, its state saved
    start     from the start of the process to the end of its first further step
    imports   of what a rank imports until its first batch, in a process that does nothing else
    verify    one checkpoint read and verified, in a process that does nothing else

The first round fills caches and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from data_pipeline.core.errors import UserError
from mokd.runs.exit_codes import EXIT_STOPPED
from mokd.runs.metrics import read_metrics

RESULT = Path(__file__).with_name("results") / "restart.json"
SPARE_STEPS = 10_000
LOOK_SECONDS = 0.005
CREATE = """
import sys
from pathlib import Path
from mokd.config import load_config
from {runs} import RunDirectory
RunDirectory.create(Path(sys.argv[1]), load_config(Path(sys.argv[2]), sys.argv[3:]))
"""
TIMED = """
import sys, time
from pathlib import Path
{prepare}
began = time.perf_counter()
{work}
print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Layout:
    """Where a version of this project keeps what a restart is made of."""

    entry: str
    loader: str
    runs: str
    checkpoints: str


LAYOUTS = (
    Layout(
        "mokd.training.entry", "data_pipeline.loaders.ffcv", "mokd.runs.run_directory", "mokd.checkpointing.reading"
    ),
    Layout("mokd.train", "data_pipeline.ffcv_loader", "mokd.run_directory", "mokd.checkpoint"),
)


class Version:
    """One checkout and its run, in `folder`."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.run = checkout.resolve(), folder / "run"
        modules = (layout for layout in LAYOUTS if (checkout / f"{layout.entry.replace('.', '/')}.py").exists())
        found = next(modules, None)
        if found is None:
            raise UserError(
                f"{checkout}: no checkout of this project, or of a layout that this benchmark does not know"
            )
        if len(list(checkout.glob("*/_native*.so"))) < 2:
            raise UserError(f"{checkout}: call python setup.py build_ext --inplace there")
        self.layout = found

    def create(self, config: str, overrides: list[str]) -> None:
        """The run, with a first save to resume from."""
        steps = [f"optim.max_steps={SPARE_STEPS}", f"optim.epochs={SPARE_STEPS}", "checkpoint.every_steps=1000000000"]
        quiet = ["logging.every_steps=1", "logging.tensorboard=false", "evaluation.every_epochs=null"]
        code = CREATE.format(runs=self.layout.runs)
        self._python("-c", code, self.run, self.checkout / "configs" / config, *overrides, *steps, *quiet)
        self.restart()

    def restart(self) -> dict[str, float]:
        """Starts, waits for a step, stops: `start` and `stop`."""
        done, began = self._last_step(), time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", self.layout.entry, str(self.run)], stderr=subprocess.PIPE, **self._where()
        )
        while self._last_step() <= done and process.poll() is None:
            time.sleep(LOOK_SECONDS)
        stepped = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        left = time.monotonic()
        if process.returncode != EXIT_STOPPED:
            raise UserError(f"{self.checkout}: {errors.strip() or f'status {process.returncode}'}")
        return {"start": stepped - began, "stop": left - stepped}

    def parts(self) -> dict[str, float]:
        """`imports` and `verify`, each in a process of its own."""
        newest = max((self.run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
        reading = f"from {self.layout.checkpoints} import read_checkpoint"
        return {
            "imports": self._timed("", f"import {self.layout.entry}, {self.layout.loader}"),
            "verify": self._timed(reading, f"assert read_checkpoint(Path({str(newest)!r})) is not None"),
        }

    def commit(self) -> str:
        """The commit that is checked out."""
        command = ["git", "-C", str(self.checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def _timed(self, prepare: str, work: str) -> float:
        return float(self._python("-c", TIMED.format(prepare=prepare, work=work)).splitlines()[-1])

    def _python(self, *arguments: object) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, **self._where())
        if done.returncode:
            raise UserError(f"{self.checkout}: {done.stderr.strip()}")
        return str(done.stdout)

    def _where(self) -> dict[str, Any]:
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_STEP_ID")}
        return {"cwd": self.checkout, "env": {**variables, "PYTHONPATH": str(self.checkout)}, "text": True}

    def _last_step(self) -> int:
        lines = read_metrics(self.run / "metrics.jsonl") if (self.run / "metrics.jsonl").exists() else []
        return int(lines[-1]["step"]) if lines else 0


def run(older: Path, config: str, overrides: list[str], rounds: int) -> dict[str, Any]:
    """Medians and single measurements of both, in turns; `ratios` say how many times as long the older one takes."""
    with tempfile.TemporaryDirectory(prefix="mokd-restart-") as scratch:
        versions = {
            name: Version(checkout, Path(scratch) / name)
            for name, checkout in (("older", older), ("ours", machine.ROOT))
        }
        for version in versions.values():
            version.create(config, overrides)
        measured: dict[str, dict[str, list[float]]] = {name: {} for name in versions}
        for index in range(rounds + 1):
            for name, version in versions.items():
                for part, seconds in {**version.restart(), **version.parts()}.items():
                    if index:
                        measured[name].setdefault(part, []).append(round(seconds, 3))
    medians = {
        name: {part: statistics.median(times) for part, times in parts.items()} for name, parts in measured.items()
    }
    return {
        "seconds": medians,
        "ratios": {part: round(medians["older"][part] / seconds, 2) for part, seconds in medians["ours"].items()},
        "measurements": measured,
        "older_commit": versions["older"].commit(),
        "arguments": [config, *overrides],
        "machine": machine.describe(["torch", "timm", "ffcv", "numba"], ["mokd", "data_pipeline", "launcher"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("older", type=Path)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    try:
        result = run(given.older, given.config, given.overrides, given.rounds)
    except UserError as error:
        sys.exit(f"error: {error}")
    text = json.dumps(result, indent=1)
    print(text)
    if given.record:
        RESULT.write_text(text + "\n")


if __name__ == "__main__":
    main()
