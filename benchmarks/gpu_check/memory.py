"""The memory of a step against the estimate that `mokd launch` warns by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.setting import Setting, give_back, peak_of, unless_full
from benchmarks.step import peak_memory
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from launcher.preflight.memory import estimate_bytes


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """By images a step, in MB. `taken`: of the GPU as a whole, with CUDA's own and what the allocator keeps."""
    for images in setting.batches:
        config = setting.sized(images)
        estimate = estimate_bytes(config, 1) / 2**20
        if not setting.on_gpu:  # all of a process, its libraries included
            peak = peak_memory(config, "ours")
            yield str(images), {"estimate_mb": estimate, "peak_mb": peak}
            continue
        peak_bytes = unless_full(_peak, config, setting)
        if peak_bytes is None:
            yield str(images), {"estimate_mb": estimate, "peak_mb": "does not fit"}
            continue
        free, whole = torch.cuda.mem_get_info(setting.device)
        taken = (whole - free) / 2**20
        give_back()
        figures = {"estimate_mb": estimate, "peak_mb": peak_bytes / 2**20, "taken_mb": taken}
        yield str(images), {**figures, "estimate_to_taken": estimate / taken}


def _peak(config: Any, setting: Setting) -> int | None:
    pair = Pair(config, setting.device)
    step = OurStep(pair)

    def run() -> None:
        for number in range(setting.effort.warmup):
            step(pair.views, FIRST_STEP + number)

    return peak_of(run, setting.device)
