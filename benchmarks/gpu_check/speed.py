"""Our step against the plain one, alternating; both have to compute the same losses, or no clock runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.setting import Setting, unless_full
from benchmarks.step import Step, alternate, same_losses
from benchmarks.step_ours import OurStep, Pair
from benchmarks.step_plain import PlainStep


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Images per second of both, by images a step."""
    for images in setting.batches:
        found = unless_full(against_plain, setting, images)
        yield str(images), found or "does not fit into the GPU's memory"


def against_plain(setting: Setting, images: int) -> dict[str, float]:
    """Images per second of both contenders, and their ratio."""
    config = setting.sized(images)
    pairs = {"ours": Pair(config, setting.device), "plain": Pair(config, setting.device)}
    contenders: dict[str, Step] = {"ours": OurStep(pairs["ours"]), "plain": PlainStep(pairs["plain"])}
    views = pairs["ours"].views
    step = same_losses(contenders, views, config.precision.compute)
    seconds = alternate(contenders, views, step, setting.effort, setting.device, print)
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    return {**rates, "ratio": rates["ours"] / rates["plain"]}
