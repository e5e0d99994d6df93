"""Our step against the plain one, alternating; both have to compute the same losses, or no clock runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.setting import Setting, unless_full
from benchmarks.gpu_check.switches import Switch, changed
from benchmarks.step import Step, alternate, same_losses
from benchmarks.step_ours import OurStep, Pair
from benchmarks.step_plain import PlainStep


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Images per second of both, by images a step."""
    for images in setting.batches:
        found = unless_full(against_plain, setting, images)
        yield str(images), found or "does not fit into the GPU's memory"


def against_plain(setting: Setting, images: int) -> dict[str, float]:
    """Images per second of both contenders, on GPUs also of ours as CUDA graphs, and ratios to the plain one."""
    config = setting.sized(images)
    ours = Pair(config, setting.device)
    contenders: dict[str, Step] = {"ours": OurStep(ours), "plain": PlainStep(Pair(config, setting.device))}
    views = ours.views
    step = same_losses(contenders, views, config.precision.compute)
    if setting.on_gpu:
        recorded = changed(config, Switch(("execution.cuda_graphs=true",)))
        contenders["replayed"] = OurStep(Pair(recorded, setting.device))
    seconds = alternate(contenders, views, step, setting.effort, setting.device, print)
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    ratios = {f"{name}_to_plain": rate / rates["plain"] for name, rate in rates.items() if name != "plain"}
    return {**rates, **ratios}
