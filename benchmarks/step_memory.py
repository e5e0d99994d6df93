"""Some steps of one contender in a fresh process, for its peak memory. `mokd bench step` starts it.

usage: python -m benchmarks.step_memory CONFIG.yaml ours|plain
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from benchmarks.step_plain import PlainStep
from mokd.config import load_config
from mokd.distributed import Ranks, pick_device

STEPS = 3


def main(config: str, contender: str) -> None:
    device = pick_device(Ranks())
    pair = Pair(load_config(Path(config)), device)
    step = {"ours": OurStep, "plain": PlainStep}[contender](pair)
    for number in range(STEPS):
        step(pair.views, FIRST_STEP + number)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:  # of this process alone; getrusage would count what it was forked from
        status = Path("/proc/self/status").read_text()
        peak = int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) / 1024
    print(json.dumps({"peak_mb": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
