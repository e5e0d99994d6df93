"""What commands let their user wait, this checkout alternating with an earlier one.

`python -m benchmarks.commands --before CHECKOUT --config FILE --record`. CHECKOUT has its native library built.
FILE is a configuration that both understand, which logs every step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import ROOT, describe
from data_pipeline.core.errors import DataError

ROUNDS = 5
_PACKAGES = ("torch", "torchvision", "timm", "ffcv", "typer", "pydantic")

Command = Callable[[Path, Path], float]


def _mokd(checkout: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=checkout, env=variables, text=True, **streams)  # type: ignore[call-overload]


def _seconds(*arguments: str) -> Command:
    """From the start of a command to its end; `RUN` and `CONFIG` stand for what is given."""

    def measure(checkout: Path, folder: Path) -> float:
        given = {"RUN": str(folder / checkout.name), "CONFIG": str(folder / "config.yaml")}
        began = time.perf_counter()
        process = _mokd(checkout, *(given.get(argument, argument) for argument in arguments))
        _, said = process.communicate()
        if process.returncode:
            raise DataError(f"{checkout}: mokd {' '.join(arguments)} failed: {said.strip()[-500:]}")
        return time.perf_counter() - began

    return measure


def first_step(checkout: Path, folder: Path) -> float:
    """From the start of `mokd train` to its line about step 1. Leaves the run behind, for the other commands."""
    shutil.rmtree(folder / checkout.name, ignore_errors=True)
    began = time.perf_counter()
    process = _mokd(checkout, "train", folder / "config.yaml", f"name={checkout.name}", "--root", folder)
    assert process.stderr is not None
    found, said = 0.0, []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 1/"):
            found = time.perf_counter() - began
    if process.wait() or not found:
        raise DataError(f"{checkout}: mokd train failed: {''.join(said).strip()[-500:]}")
    return found


COMMANDS: dict[str, Command] = {
    "mokd train, to its first step": first_step,
    "mokd --help": _seconds("--help"),
    "mokd config CONFIG": _seconds("config", "CONFIG"),
    "mokd status RUN": _seconds("status", "RUN"),
}


def run(before: Path, config: Path, rounds: int) -> dict[str, Any]:
    """Seconds of every command by checkout: median and all."""
    checkouts = {"before": before, "after": ROOT}
    found: dict[str, dict[str, list[float]]] = {name: {side: [] for side in checkouts} for name in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="mokd-commands-") as scratch:
        shutil.copy(config, Path(scratch) / "config.yaml")
        for number in range(-1, rounds):  # the first round warms the page cache up and writes Python's caches
            for name, measure in COMMANDS.items():
                for side, checkout in checkouts.items():
                    seconds = measure(checkout.resolve(), Path(scratch))
                    if number >= 0:
                        found[name][side].append(round(seconds, 3))
                    print(f"round {number + 1}: {name}, {side}: {seconds:.2f} s", file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=before, capture_output=True, text=True, check=False)
    return {
        "seconds": {
            name: {side: round(statistics.median(values), 3) for side, values in sides.items()}
            for name, sides in found.items()
        },
        "all_seconds": found,
        "rounds": rounds,
        "config": yaml.safe_load(config.read_text(encoding="utf-8")),
        "before": commit.stdout.strip(),
        "machine": describe(_PACKAGES, ["launcher", "mokd", "data_pipeline"]),
    }


def main() -> None:
    """Measures and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results/commands.json")
    given = parser.parse_args()
    result = run(given.before.resolve(), given.config, given.rounds)
    text = json.dumps(result, indent=1) + "\n"
    if given.record:
        (ROOT / "benchmarks" / "results" / "commands.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
