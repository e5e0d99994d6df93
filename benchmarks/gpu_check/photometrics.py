"""The photometric kernels of the device against those of CPUs, on the same crops and draws."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.setting import Setting
from benchmarks.step_ours import synchronise
from data_pipeline.config import ViewsConfig
from data_pipeline.core.errors import DataError
from data_pipeline.core.host_memory import Packed, Ring
from data_pipeline.core.native_library import PHOTOMETRIC, Engine
from data_pipeline.core.triton_support import why_no_triton
from data_pipeline.sampling.draws import draw_views, view_sizes
from data_pipeline.transforms.photometrics import CpuPhotometrics, pack_parameters, photometrics_torch

LEVEL = 1 / 255
TOLERANCE = 0.1 * LEVEL  # before normalisation
FAR = 1e-4  # the part of pixels that may be further apart: right at the threshold, solarised in one and not the other


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """The part of pixels that differ, and images per second of both."""
    views, images = setting.config.views, setting.batches[-1]
    packed = _batch(views, images, pinned=setting.on_gpu)
    engine = Engine(len(os.sched_getaffinity(0)))
    native = CpuPhotometrics(views, torch.float32, engine)
    fused = setting.on_gpu and why_no_triton() is None
    on_device = _fused(packed, setting) if fused else _in_torch(packed, setting)
    yield "kernels", "triton" if fused else "torch operations"
    expected = native(packed)
    tolerance = TOLERANCE / min(views.std)
    pairs = list(zip(on_device(), expected, strict=True))
    far = max(float(((a.float().cpu() - b).abs() > tolerance).float().mean()) for a, b in pairs)
    yield "differing_pixels", far
    if not far < FAR:
        raise DataError(f"{far:.2g} of all pixels differ by more than a tenth of a level")
    rates = {"cpu": _rate(lambda: native(packed), setting, images), "device": _rate(on_device, setting, images)}
    yield "images_per_second", rates
    engine.close()


def _batch(views: ViewsConfig, images: int, pinned: bool) -> Packed:
    """Crops of noise, smooth enough for a blur to matter."""
    numbers = np.arange(images)
    parameters = pack_parameters(draw_views(views, 1, 2, numbers, np.full(images, 400), np.full(images, 300)))
    row_bytes = int((3 * view_sizes(views).astype(np.int64) ** 2).sum())
    flat = parameters.view(np.uint8)
    packed = Ring(1, images, row_bytes, flat.shape[1], pinned=pinned).next(numbers, np.zeros(images, np.int64))
    waves = np.sin(np.arange(row_bytes) / 7.0 + numbers[:, None]) * 120.0 + 128.0
    packed.crops[:] = np.clip(waves, 0, 255).astype(np.uint8)
    packed.parameters[:] = flat
    return packed


def _fused(packed: Packed, setting: Setting) -> Callable[[], tuple[Tensor, ...]]:
    from data_pipeline.transforms.photometrics_triton import photometrics_triton  # which imports Triton

    crops, parameters = (torch.from_numpy(x).to(setting.device) for x in (packed.crops, packed.parameters))
    return lambda: photometrics_triton(crops, setting.config.views, parameters, torch.float32)


def _in_torch(packed: Packed, setting: Setting) -> Callable[[], tuple[Tensor, ...]]:
    crops, parameters = torch.from_numpy(packed.crops).to(setting.device), packed.parameters.view(PHOTOMETRIC)
    return lambda: photometrics_torch(crops, setting.config.views, parameters, torch.float32)


def _rate(run: Callable[[], object], setting: Setting, images: int) -> float:
    for _ in range(setting.effort.warmup):
        run()
    synchronise(setting.device)
    began = time.perf_counter()
    for _ in range(setting.effort.rounds):
        run()
    synchronise(setting.device)
    return images * setting.effort.rounds / (time.perf_counter() - began)
