"""Runs parts, each in a process of its own: what one breaks, fills or hangs in does not touch the others.

usage, by itself only: python -m benchmarks.gpu_check.run PART CONFIG.yaml cuda|cpu FIGURES.json
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.trace import TRACES
from benchmarks.machine import ROOT
from data_pipeline.core.errors import DataError, UserError
from data_pipeline.core.schema import dump_yaml
from mokd.config import RunConfig, load_config
from mokd.optim.precision import set_arithmetic
from mokd.runs.files import read_json, replace_json

# seconds that a part may take on a GPU; together ten minutes
SECONDS = {
    "kernels": 25,
    "step": 45,
    "photometrics": 25,
    "graphs": 60,
    "speed": 45,
    "memory": 35,
    "batch": 50,
    "trace": 25,
    "loader": 50,
    "parallel": 70,
    "switches": 70,
    "compile": 100,
}
Measure = Callable[[Setting], Iterator[tuple[str, Any]]]


def measure_of(part: str) -> Measure:
    """The function of a part."""
    found: Measure = importlib.import_module(f"benchmarks.gpu_check.{part}").measure
    return found


def check(
    config: RunConfig, record: Record, device: str, parts: Sequence[str], *, patience: float, again: bool
) -> bool:
    """Measures the parts that `record` has not got yet; True when all of them ended well."""
    passed = True
    for part in parts:
        if record.has(part) and not again:
            print(f"{part}: recorded already", flush=True)
            continue
        began = time.monotonic()
        figures, problem = in_process(part, config, device, patience * SECONDS[part], record.path.parent)
        record.add(part, figures, problem, time.monotonic() - began)
        print(f"{part}: {problem or 'done'}, {time.monotonic() - began:.0f} s: {json.dumps(figures)}", flush=True)
        passed = passed and problem is None
    return passed


def in_process(
    part: str, config: RunConfig, device: str, seconds: float, traces: Path
) -> tuple[dict[str, Any], str | None]:
    """A part's figures, as far as it came, and what kept it from its end."""
    with tempfile.TemporaryDirectory(prefix="mokd-gpu-check-") as folder:
        given, found = Path(folder) / "config.yaml", Path(folder) / "found.json"
        given.write_text(dump_yaml(config))
        traces.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu_check.run", part, str(given), device, str(found)]
        # a session of its own: with the part end the ranks that it has started
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, TRACES: str(traces)})
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            more = 2 * seconds / SECONDS[part]
            problem: str | None = f"not done within {seconds:g} s; --patience {more:.2g} gives more"
        else:
            problem = None if child.returncode == 0 else f"failed with status {child.returncode}"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        document = read_json(found) or {}
        if problem and (reason := document.get("problem")):
            problem = reason
        return document.get("figures", {}), problem


def main(part: str, given: str, device: str, found: str) -> int:
    """One part, in this process. Figures are written as they are found."""
    setting = Setting.on(load_config(Path(given)), torch.device(device))
    set_arithmetic(setting.config.precision)
    figures: dict[str, Any] = {}
    try:
        for name, figure in measure_of(part)(setting):
            figures[name] = figure
            replace_json(Path(found), {"figures": figures})
    except (DataError, UserError) as error:
        replace_json(Path(found), {"figures": figures, "problem": str(error)})
        return 1
    except Exception as error:
        replace_json(Path(found), {"figures": figures, "problem": f"{type(error).__name__}: {error}"})
        raise
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
