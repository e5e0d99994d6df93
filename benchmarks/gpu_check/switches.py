"""Switches of the step that change its speed and not its mathematics: each against the step without it, and a rule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check.setting import Setting, give_back, peak_of, unless_full, with_batch
from benchmarks.step import TOLERANCE, alternate, same_losses
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise
from data_pipeline.core import schema
from data_pipeline.core.errors import DataError
from mokd.config import RunConfig
from mokd.optim.precision import set_arithmetic

FASTER, MORE_MEMORY, HOUR_SECONDS = 1.05, 1.10, 3600.0
RULE = (
    f"A change becomes the default on GPUs where it makes the step at least {FASTER:g} times as fast at every batch "
    f"measured, takes at most {MORE_MEMORY:g} times the memory, and wins back its first step within an hour."
)


@dataclass(frozen=True)
class Switch:
    """changes: of the configuration, for it to be tried. gpus_only, compiles: where it can be tried at all."""

    changes: tuple[str, ...]
    gpus_only: bool = False
    compiles: bool = False


SWITCHES = {
    "execution.recompute_logits=false": Switch(("execution.recompute_logits=false",)),
    "execution.recompute_logits=true": Switch(("execution.recompute_logits=true",)),
    "execution.overlap_teachers=true": Switch(("execution.overlap_teachers=true",), gpus_only=True),
    "precision.channels_last=false": Switch(("precision.channels_last=false",)),
    # never a default, whatever it costs: this is what it costs
    "precision.deterministic=true": Switch(("precision.deterministic=true",)),
    "execution.compile=true": Switch(("execution.compile=true",), compiles=True),
    "execution.cuda_graphs=true": Switch(
        ("execution.compile=true", "execution.cuda_graphs=true"), gpus_only=True, compiles=True
    ),
}
NEVER_DEFAULT = {"precision.deterministic=true"}


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """By switch: times as fast and times the memory by images a step, seconds of the first step, and the verdict."""
    yield "rule", RULE
    for name, switch in SWITCHES.items():
        if (switch.gpus_only and not setting.on_gpu) or (switch.compiles and not setting.heavy):
            yield name, "only tried on a GPU"
            continue
        found: dict[str, Any] = {}
        for images in setting.batches:
            base = with_batch(setting.config, images)
            figures = unless_full(_against, setting, base, switch)
            give_back()
            found[str(images)] = figures or "does not fit into the GPU's memory"
            yield name, {**found, **verdict(name, found)}


def verdict(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the rule says of a switch, from its figures by batch."""
    if name in NEVER_DEFAULT:
        return {"becomes_default": False, "because": "it is for those who need the same bits"}
    if any(isinstance(figures, str) for figures in found.values()):
        return {"becomes_default": False, "because": "not measured at every batch"}
    for images, figures in found.items():
        if figures["losses_differ"]:
            return {"becomes_default": False, "because": figures["losses_differ"]}
        if figures["times_as_fast"] < FASTER:
            return {"becomes_default": False, "because": f"{figures['times_as_fast']:.2f} times as fast at {images}"}
        if (figures["times_the_memory"] or 1.0) > MORE_MEMORY:
            memory = f"{figures['times_the_memory']:.2f} times the memory at {images}"
            return {"becomes_default": False, "because": memory}
        won = HOUR_SECONDS * (1.0 - 1.0 / figures["times_as_fast"])
        if figures["first_step_seconds"] > won:
            late = f"its first step of {figures['first_step_seconds']:.0f} s is not won back within an hour at {images}"
            return {"becomes_default": False, "because": late}
    return {"becomes_default": True, "because": "faster at every batch"}


def changed(config: RunConfig, switch: Switch) -> RunConfig:
    """The configuration with the switch thrown."""
    raw = schema.apply_overrides(config.model_dump(mode="json"), switch.changes)
    return schema.validate(RunConfig, raw, "gpu-check")


def _against(setting: Setting, base: RunConfig, switch: Switch) -> dict[str, Any]:
    """Figures of a switch at one batch, alternating with the step without it."""
    contenders, peaks, first = {}, {}, {}
    pairs = {}
    for name, config in {"plain": base, "ours": changed(base, switch)}.items():
        set_arithmetic(config.precision)
        before = torch.cuda.memory_allocated(setting.device) if setting.on_gpu else 0
        began = time.perf_counter()
        pairs[name] = Pair(config, setting.device)
        step = OurStep(pairs[name])

        def call(views: Any, number: int, step: OurStep = step, config: RunConfig = config) -> Any:
            set_arithmetic(config.precision)
            return step(views, number)

        peak = peak_of(lambda call=call, views=pairs[name].views: call(views, FIRST_STEP), setting.device)
        synchronise(setting.device)
        first[name] = time.perf_counter() - began
        peaks[name] = peak - before if peak else None
        contenders[name] = call
    views, differs = pairs["ours"].views, None
    try:
        step_number = same_losses(contenders, views, TOLERANCE[base.precision.compute])
    except DataError as error:
        step_number, differs = FIRST_STEP + 2, str(error)
    seconds = alternate(contenders, views, step_number, setting.effort, setting.device, print)
    set_arithmetic(setting.config.precision)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "times_as_fast": medians["plain"] / medians["ours"],
        "times_the_memory": peaks["ours"] / peaks["plain"] if peaks["ours"] else None,
        "first_step_seconds": first["ours"] - first["plain"],
        "losses_differ": differs,
    }
