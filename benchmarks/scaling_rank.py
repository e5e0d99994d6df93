"""One rank of `mokd bench scaling`.

usage: python -m benchmarks.scaling_rank CONFIG.yaml RESULT.json WARMUP STEPS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.step_ours import FIRST_STEP, Clock, OurStep, Pair, synchronise
from mokd.config import load_config
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import barrier, join, leave, ranks_from_environment
from mokd.training.entry import leave_at_once


def main(given: str, found: str, warmup: str, steps: str) -> None:
    config = load_config(Path(given))
    ranks = ranks_from_environment()
    device = pick_device(ranks, config.parallel.device)
    torch.set_num_threads(config.parallel.threads_per_rank or 1)
    join(ranks, device, config.parallel.timeout_seconds)
    pair = Pair(config, device, ranks.world_size, ranks.rank)
    step, times = OurStep(pair), []
    for number in range(int(warmup) + int(steps)):
        barrier()
        began = time.perf_counter()
        step(pair.views, FIRST_STEP + number)
        synchronise(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[int(warmup) :])
    clock = Clock(device)
    OurStep(pair, clock)(pair.views, FIRST_STEP)
    if ranks.is_main:
        rate = config.optim.global_batch / seconds
        result = {"images_per_second": rate, "seconds": seconds, "backward_seconds": clock.ms["backward"] / 1e3}
        Path(found).write_text(json.dumps(result))
    barrier()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_at_once(0)
