"""The largest batch that fits, how fast it is, and the plain step beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu_check.setting import Setting, give_back, peak_of, unless_full
from benchmarks.gpu_check.speed import against_plain
from benchmarks.step import Effort
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Batches that were tried with their memory and speed, the largest, and how it compares with the plain step."""
    tried: dict[str, Any] = {}
    low, high = 0, setting.batches[-1]
    while high <= setting.largest:
        tried[str(high)] = unless_full(_trial, setting, high)
        give_back()
        yield "tried", tried
        if tried[str(high)] is None:
            break
        low, high = high, 2 * high
    for _ in range(2):  # to a quarter of the gap between the last two
        middle = (low + high) // 2
        if high > setting.largest or middle <= low:
            break
        tried[str(middle)] = unless_full(_trial, setting, middle)
        give_back()
        low, high = (middle, high) if tried[str(middle)] else (low, middle)
        yield "tried", tried
    yield "largest", low
    # both contenders lie on the GPU at once: half of what one of them may take
    brief = replace(setting, effort=Effort(rounds=min(2, setting.effort.rounds), steps=1, warmup=1))
    for images in (low, low // 2, low // 4):
        if images >= 2 and (found := unless_full(against_plain, brief, images)):
            yield "against_plain", {"images": images, **found}
            break


def _trial(setting: Setting, images: int) -> dict[str, float | None]:
    """Images per second and peak memory of our step alone."""
    pair = Pair(setting.sized(images), setting.device)
    step = OurStep(pair)

    def run() -> None:
        for number in range(setting.effort.warmup):
            step(pair.views, FIRST_STEP + number)

    peak = peak_of(run, setting.device)
    synchronise(setting.device)
    began = time.perf_counter()
    run()
    synchronise(setting.device)
    rate = images * setting.effort.warmup / (time.perf_counter() - began)
    return {"images_per_second": rate, "peak_mb": peak and peak / 2**20}
