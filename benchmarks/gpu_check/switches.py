"""Switches of the step that change its speed and not its mathematics: each against the step without it, and a rule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.setting import Setting, give_back, peak_of, unless_full, with_batch
from benchmarks.step import Step, alternate, same_losses
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise
from data_pipeline.core import schema
from data_pipeline.core.errors import DataError
from mokd.config import RunConfig
from mokd.optim.precision import set_arithmetic
from mokd.training.graph_passes import STEPS_AHEAD

FASTER, MORE_MEMORY, HOUR_SECONDS = 1.05, 1.10, 3600.0
RULE = (
    f"A change becomes the default on GPUs where it makes the step at least {FASTER:g} times as fast at every batch "
    f"measured, takes at most {MORE_MEMORY:g} times the memory, and wins back its first step within an hour."
)


@dataclass(frozen=True)
class Switch:
    """changes: of the configuration, for it to be tried. gpus_only: tried nowhere else. compiles: for minutes."""

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
}
NEVER_DEFAULT = {"precision.deterministic=true"}


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Those that need no compiling."""
    yield from measure_some(setting, {name: switch for name, switch in SWITCHES.items() if not switch.compiles})


def measure_some(setting: Setting, some: Mapping[str, Switch]) -> Iterator[tuple[str, Any]]:
    """By switch: times as fast and times the memory by images a step, seconds of the first step, and the verdict."""
    yield "rule", RULE
    found: dict[str, dict[str, Any]] = {name: {} for name in some}
    for images in setting.batches:
        config = with_batch(setting.config, images)
        for name, switch in some.items():
            if switch.gpus_only and not setting.on_gpu:
                yield name, "only tried on a GPU"
                continue
            figures = unless_full(_against, setting, config, changed(config, switch))
            give_back()
            found[name][str(images)] = figures or "does not fit into the GPU's memory"
            yield name, {**found[name], **verdict(name, found[name], setting.batches)}


def verdict(name: str, found: Mapping[str, Any], batches: Sequence[int]) -> dict[str, Any]:
    """What the rule says of a switch, from its figures by batch."""
    against = "it is for those who need the same bits" if name in NEVER_DEFAULT else None
    for images in map(str, batches):
        figures = found.get(images)
        against = against or (
            _against_it(figures, images) if isinstance(figures, dict) else f"not measured at {images}"
        )
    return {"becomes_default": against is None, "because": against or "faster at every batch"}


def _against_it(figures: Mapping[str, Any], images: str) -> str | None:
    """What speaks against a switch at one batch."""
    fast, memory, first = (figures[key] for key in ("times_as_fast", "times_the_memory", "first_step_seconds"))
    if figures["losses_differ"]:
        return str(figures["losses_differ"])
    if fast < FASTER:
        return f"{fast:.2f} times as fast at {images}"
    if memory is not None and memory > MORE_MEMORY:
        return f"{memory:.2f} times the memory at {images}"
    if first > HOUR_SECONDS * (1.0 - 1.0 / fast):
        return f"its first step of {first:.0f} s is not won back within an hour at {images}"
    return None


def changed(config: RunConfig, switch: Switch) -> RunConfig:
    """The configuration with the switch thrown."""
    raw = schema.apply_overrides(config.model_dump(mode="json"), switch.changes)
    return schema.validate(RunConfig, raw, "gpu-check")


class _Contender:
    """A step of one configuration, with what its first one has cost."""

    def __init__(self, setting: Setting, config: RunConfig) -> None:
        self.config, self.device = config, setting.device
        before = torch.cuda.memory_allocated(self.device) if setting.on_gpu else 0
        began = time.perf_counter()
        self.pair = Pair(config, self.device)
        self.step = OurStep(self.pair)
        self(self.pair.views, FIRST_STEP)
        synchronise(self.device)
        self.first_step_seconds = time.perf_counter() - began
        peak = peak_of(self._more_steps, self.device)
        self.memory = peak - before if peak else None

    def _more_steps(self) -> None:
        """As many as come before a recording, and one."""
        for _ in range(STEPS_AHEAD):
            self(self.pair.views, FIRST_STEP)

    def __call__(self, views: Sequence[Tensor], number: int) -> list[dict[str, Tensor]]:
        """One step, in the arithmetic of its configuration."""
        set_arithmetic(self.config.precision)
        return self.step(views, number)


def _against(setting: Setting, base: RunConfig, config: RunConfig) -> dict[str, Any]:
    """Figures of a changed configuration at one batch, alternating with the step as it was."""
    plain, ours = _Contender(setting, base), _Contender(setting, config)  # from the same first weights
    contenders: dict[str, Step] = {"plain": plain, "ours": ours}
    views, number, differ = ours.pair.views, FIRST_STEP + 2, None
    try:
        number = same_losses(contenders, views, config.precision.compute)
    except DataError as error:
        differ = str(error)
    seconds = alternate(contenders, views, number, setting.effort, setting.device, print)
    set_arithmetic(setting.config.precision)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "images_per_second": {
            name: config.optim.global_batch / medians[key] for name, key in (("without", "plain"), ("with", "ours"))
        },
        "times_as_fast": medians["plain"] / medians["ours"],
        "times_the_memory": ours.memory / plain.memory if ours.memory and plain.memory else None,
        "first_step_seconds": ours.first_step_seconds - plain.first_step_seconds,
        "losses_differ": differ,
    }
