"""The largest batch per GPU, or per process on CPUs, that a configuration fits into: found by trying.

Every trial is some steps in a fresh process; batches double until one does not fit, then the gap is halved.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.step import PACKAGES, SOURCES
from data_pipeline.core.errors import DataError, UserError
from data_pipeline.core.schema import dump_yaml
from mokd.config import RunConfig
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import Ranks

NO_ROOM = re.compile(r"out of memory|allocate memory|MemoryError|bad_alloc|ALLOC_FAILED", re.IGNORECASE)
_SMALLEST = 2  # batch statistics of one image are no statistics


def run(config: RunConfig, limit_mb: float | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The largest batch within `limit_mb` (default: the GPU's memory, or what this machine has available)."""
    device = pick_device(Ranks(), config.parallel.device)
    limit = limit_mb or _available_mb(device)
    trials: list[dict[str, Any]] = []

    def fits(batch: int) -> bool:
        peak = _peak_mb(config, batch, limit)
        within = peak is not None and peak <= limit
        trials.append({"batch": batch, "peak_mb": peak, "fits": within})
        say(f"batch {batch}: " + ("does not fit" if peak is None else f"{peak:,.0f} of {limit:,.0f} MB"))
        return within

    if not fits(_SMALLEST):
        raise UserError(f"bench memory: not even a batch of {_SMALLEST} fits into {limit:,.0f} MB")
    low, high = _SMALLEST, 2 * _SMALLEST
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {
        "largest_batch": low,
        "peak_mb": next(t["peak_mb"] for t in trials if t["batch"] == low),
        "limit_mb": limit,
        "does_not_fit": high,
        "trials": trials,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": describe(PACKAGES, SOURCES),
    }


def _peak_mb(config: RunConfig, batch: int, limit_mb: float) -> float | None:
    """Peak memory of some steps; None where memory ran out. DataError when they fail for another reason."""
    optim = config.optim.model_copy(update={"global_batch": batch * config.optim.accumulate})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.yaml"
        path.write_text(dump_yaml(config.model_copy(update={"optim": optim})))
        command = [sys.executable, "-m", "benchmarks.step_memory", str(path), "ours", str(limit_mb)]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode == 0:
        return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    # a killed process was most likely one too big
    if done.returncode < 0 or NO_ROOM.search(done.stderr):
        return None
    raise DataError(f"bench memory: batch {batch}: {done.stderr.strip().splitlines()[-1]}")


def _available_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    available = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert available is not None
    return int(available[1]) / 1024
