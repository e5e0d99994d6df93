"""Where a step's time goes: torch's profiler, its trace for chrome://tracing, and the kernels that take longest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.setting import Setting, give_back
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise

TRACES = "MOKD_GPU_CHECK_TRACES"  # the folder for traces; none are written without it
TOP = 20


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """By images a step: milliseconds, launches, the part of the time in which the device works, the longest kernels."""
    for images in setting.batches:
        yield str(images), _profile(setting, images)
        give_back()


def _profile(setting: Setting, images: int) -> dict[str, Any]:
    pair = Pair(setting.sized(images), setting.device)
    step = OurStep(pair)
    for number in range(setting.effort.warmup):
        step(pair.views, FIRST_STEP + number)
    synchronise(setting.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with profile(activities=activities) as found:
        step(pair.views, FIRST_STEP + setting.effort.warmup)
        synchronise(setting.device)
    trace = None
    if folder := os.environ.get(TRACES):
        card = torch.cuda.get_device_name() if setting.on_gpu else "cpu"
        trace = Path(folder) / f"gpu-{card.lower().replace(' ', '-')}-{images}-trace.json.gz"
        found.export_chrome_trace(str(trace))
    return {**summary(found, setting.on_gpu), "trace": trace and trace.name}


def summary(found: profile, on_gpu: bool) -> dict[str, Any]:
    """Figures of one profiled step. On a CPU its operations take the place of kernels."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in found.events() if _launched(event, kind)]
    averages = [event for event in found.key_averages() if _launched(event, kind)]
    own = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in averages}
    counts = {event.key: event.count for event in averages}
    begin, end = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    spent = sum(own.values())
    longest = sorted(own, key=lambda name: own[name], reverse=True)[:TOP]
    return {
        "ms": (end - begin) / 1e3,
        "launches": len(events) if on_gpu else "not counted on a CPU",
        "busy": spent / (end - begin),
        "longest": [
            {"name": name[:120], "calls": counts[name], "ms": own[name] / 1e3, "part": own[name] / spent}
            for name in longest
        ],
    }


def _launched(event: Any, kind: Any) -> bool:
    """Whether something ran on the device, and not a name that was given to a stretch of time."""
    return event.device_type == kind and not getattr(event, "is_user_annotation", False)
