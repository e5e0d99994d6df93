"""The step benchmark: our training step against the plain one, alternating, with medians and spread.

`mokd bench step [CONFIG]` runs it, on a synthetic batch that lies on the device. The contenders have to compute the
same losses, before and after an update, or no clock runs.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fused_loss, step_monitors
from benchmarks.machine import ROOT, describe
from benchmarks.step_ours import FIRST_STEP, Clock, OurStep, Pair, synchronise
from benchmarks.step_plain import PlainStep
from data_pipeline.core.errors import DataError
from data_pipeline.core.schema import dump_yaml
from mokd.config import RunConfig
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import Ranks

Say = Callable[[str], None]
Step = Callable[[Sequence[Tensor], int], list[dict[str, Any]]]

PACKAGES = ("torch", "triton", "timm", "numpy")
SOURCES = ("mokd", "benchmarks")
# relative: in fp32 of every term, in half precision of the branch's total; a term near zero is then mostly the rounding
# of logits, over a small temperature (0.126 in fp32, 0.117 with our products, 0.099 with the plain step's bf16 logits)
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Effort:
    """rounds: of both contenders in turn. steps: of one contender in a round. warmup: steps before any clock runs."""

    rounds: int = 7
    steps: int = 2
    warmup: int = 2


QUICK = Effort(rounds=1, steps=1, warmup=1)


def counting_flops() -> FlopCounterMode:
    """torch's counter, which does not know the product of oneDNN's linear layers (`mokd.models.linear`)."""
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build of torch

    def flops(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * weight[0]

    return FlopCounterMode(display=False, custom_mapping={product: flops} if product else None)


def run(config: RunConfig, effort: Effort, say: Say) -> dict[str, Any]:
    """Everything, for one rank of a configuration. DataError when contenders compute different losses."""
    device = pick_device(Ranks(), config.parallel.device)
    pairs = {"ours": Pair(config, device), "plain": Pair(config, device)}
    contenders: dict[str, Step] = {"ours": OurStep(pairs["ours"]), "plain": PlainStep(pairs["plain"])}
    views = pairs["ours"].views
    say("checking that both compute the same losses")
    step = same_losses(contenders, views, config.precision.compute)
    seconds = alternate(contenders, views, step, effort, device, say)
    with counting_flops() as counter:
        contenders["plain"](views, step)  # which computes nothing twice that would count
    flops = counter.get_total_flops() / pairs["ours"].images
    say("the step with monitors and without")
    monitored = step_monitors.run(pairs["ours"], max(3, effort.rounds))
    phases = _phases(pairs["ours"], effort)
    del contenders, pairs
    say("memory, each contender in a process of its own")
    memory = {name: peak_memory(config, name) for name in ("ours", "plain")}
    say("the loss by itself")
    loss = fused_loss.run(config, effort.rounds, device)
    peak = peak_flops(device, config)
    images = config.optim.global_batch
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    return {
        "images_per_second": rates,
        "ratios": {
            "step": rates["ours"] / rates["plain"],
            "peak_memory": memory["ours"] / memory["plain"],
            "fused_loss": loss["ratio"],
            "monitors": monitored["ratio"],
        },
        "monitors": monitored,
        "spread": {name: [images / max(times), images / min(times)] for name, times in seconds.items()},
        "mfu": rates["ours"] * flops / peak,
        "mfu_plain": rates["plain"] * flops / peak,
        "gflop_per_image": flops / 1e9,
        "peak_gflops": peak / 1e9,
        "phases_ms": phases,
        "peak_memory_mb": memory,
        "fused_loss_ms": loss["ms"],
        "config": _summary(config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "machine": describe(PACKAGES, SOURCES),
    }


def same_losses(contenders: dict[str, Step], views: Sequence[Tensor], compute: str) -> int:
    """Two steps of both; raises DataError unless every term agrees in both. Returns the number of the next step.

    compute: `precision.compute` of the contenders.
    """
    for step in (FIRST_STEP, FIRST_STEP + 1):
        found = {name: contender(views, step) for name, contender in contenders.items()}
        for i, (ours, plain) in enumerate(zip(found["ours"], found["plain"], strict=True)):
            for term in plain:
                a, b = float(ours[term]), float(plain[term])
                size = abs(b if compute == "fp32" else float(plain["total"]))
                if not abs(a - b) <= TOLERANCE[compute] * size:
                    raise DataError(
                        f"benchmark: branch {i + 1}, {term}: {a:.6f} and {b:.6f} in step {step - FIRST_STEP + 1}: "
                        "the contenders do not compute the same"
                    )
    return FIRST_STEP + 2


def alternate(
    contenders: dict[str, Step], views: Sequence[Tensor], step: int, effort: Effort, device: torch.device, say: Say
) -> dict[str, list[float]]:
    """Seconds per step of every round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-effort.warmup, effort.rounds):
        for name, contender in contenders.items():
            synchronise(device)
            began = time.perf_counter()
            for _ in range(effort.steps):
                contender(views, step)
            synchronise(device)
            spent = (time.perf_counter() - began) / effort.steps
            if number >= 0:
                seconds[name].append(spent)
                say(f"round {number + 1}: {name}: {1e3 * spent:.0f} ms per step")
    return seconds


def _phases(pair: Pair, effort: Effort) -> dict[str, float]:
    """Median milliseconds of our phases, with the device waited for at every border."""
    clock = Clock(pair.device)
    step = OurStep(pair, clock)
    rounds = []
    for _ in range(max(3, effort.rounds)):
        clock.ms = {}
        step(pair.views, FIRST_STEP)
        rounds.append(clock.ms)
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def peak_memory(config: RunConfig, contender: str) -> float:
    """MB at most, of a fresh process that makes some steps: of the GPU's allocator, or all of the process on a CPU."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump_yaml(config))
        file.flush()
        command = [sys.executable, "-m", "benchmarks.step_memory", file.name, contender]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DataError(f"benchmark: the {contender} step failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout)["peak_mb"]


def peak_flops(device: torch.device, config: RunConfig, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large matrix product, the best of some, in the step's precision."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or best == 0.0:
        synchronise(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _summary(config: RunConfig) -> dict[str, Any]:
    views = " + ".join(f"{group.count} x {group.size_px}" for group in config.views.groups)
    return {
        "name": config.name,
        "branches": [f"{b.backbone} {b.backbone_options or ''}".strip() for b in config.branches],
        "views": views,
        "prototypes": config.objective.prototypes,
        "batch": config.optim.global_batch,
        "precision": config.precision.compute,
        "execution": config.execution.model_dump(),
    }
