"""Some steps of one contender in a fresh process, for its peak memory. `mokd bench step` and `memory` start it.

usage: python -m benchmarks.step_memory CONFIG.yaml ours|plain [LIMIT_MB]
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

import torch

from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from benchmarks.step_plain import PlainStep
from mokd.config import load_config
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import Ranks

STEPS = 3
_NEVER_TOUCHED = 512 << 20  # bytes that libraries reserve on a CPU, about, and that cost no memory


def main(given: str, contender: str, limit_mb: str | None = None) -> None:
    config = load_config(Path(given))
    device = pick_device(Ranks(), config.parallel.device)
    if limit_mb is not None:
        allow_no_more_than(float(limit_mb) * 2**20, device)
    pair = Pair(config, device)
    step = {"ours": OurStep, "plain": PlainStep}[contender](pair)
    for number in range(STEPS):
        step(pair.views, FIRST_STEP + number)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:  # of this process alone; getrusage would count what it was forked from
        status = Path("/proc/self/status").read_text()
        peak = int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) / 1024
    print(json.dumps({"peak_mb": peak}))


def allow_no_more_than(limit: float, device: torch.device) -> None:
    """What exceeds so many bytes fails to get memory, instead of bringing the machine down."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit / whole, 1.0), device)
    else:
        reserved = int(limit) + _NEVER_TOUCHED
        resource.setrlimit(resource.RLIMIT_DATA, (reserved, reserved))


if __name__ == "__main__":
    main(*sys.argv[1:])
