"""One step in which any wait for the GPU is an error, and two runs that must give the same bits where that is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.setting import Setting, give_back
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from data_pipeline.core.errors import DataError
from mokd.optim.precision import set_arithmetic


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Terms that are not finite, waits, and parameters that differ under `precision.deterministic`."""
    # before cuBLAS is first used: it reads its workspace's setting once
    exact = setting.config.precision.model_copy(update={"deterministic": True})
    set_arithmetic(exact)
    ends = [_end(setting) for _ in range(2)]
    different = sum(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    yield "deterministic", {"parameters": len(ends[0]), "different": different}
    del ends
    give_back()
    set_arithmetic(setting.config.precision)
    broken = _gradients_without_waits(setting)
    yield "broken_terms", broken
    yield "waits", 0 if setting.on_gpu else "not looked for on a CPU"
    if broken or different:
        raise DataError(f"not finite: {broken}; other bits the second time: {different} parameters")


def _end(setting: Setting) -> list[torch.Tensor]:
    """All parameters after some steps from the first weights."""
    pair = Pair(setting.sized(setting.batches[0]), setting.device)
    step = OurStep(pair)
    for number in range(setting.effort.warmup):
        step(pair.views, FIRST_STEP + number)
    return [p.detach().cpu() for branch in pair.branches for p in branch.student.parameters()]


def _gradients_without_waits(setting: Setting) -> list[str]:
    """Gradients of a step; the one read of it, its agreement, is after."""
    pair = Pair(setting.sized(setting.batches[0]), setting.device)
    training = OurStep(pair).step
    for number in range(setting.effort.warmup):  # kernels are compiled and constants brought to the device
        training.run(FIRST_STEP + number, pair.views, pair.epoch)
    if setting.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        _, agreement = training._gradients(FIRST_STEP + setting.effort.warmup, pair.views, pair.epoch)
    finally:
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    return agreement.answer()[1]
