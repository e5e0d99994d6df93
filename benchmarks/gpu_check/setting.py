"""What a part measures with: a configuration, a device, and how much of it. On a CPU all is tiny, to test the logic."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from benchmarks.memory import NO_ROOM
from benchmarks.step import Effort
from mokd.config import RunConfig

P, T = ParamSpec("P"), TypeVar("T")
GPU_EFFORT, CPU_EFFORT = Effort(rounds=5, steps=1, warmup=3), Effort(rounds=1, steps=1, warmup=1)


@dataclass(frozen=True)
class Setting:
    """config: its device is `device`. batches: images per GPU and step. largest: no batch above it is tried.

    loader_images: synthetic ones that the loader reads, `loader_image_px` wide.
    """

    config: RunConfig
    device: torch.device
    batches: tuple[int, ...] = (8, 64)
    largest: int = 4096
    effort: Effort = GPU_EFFORT
    loader_images: int = 1024
    loader_image_px: int = 256
    loader_seconds: float = 8.0

    @classmethod
    def on(cls, config: RunConfig, device: torch.device) -> Setting:
        """The usual one for a device."""
        parallel = config.parallel.model_copy(update={"device": device.type})
        config = config.model_copy(update={"parallel": parallel})
        if device.type == "cuda":
            return cls(config, device)
        return cls(config, device, (2, 4), 8, CPU_EFFORT, 16, 48, 0.5)

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean anything."""
        return self.device.type == "cuda"

    def sized(self, images: int) -> RunConfig:
        """The configuration with so many images a step in all."""
        return with_batch(self.config, images)


def with_batch(config: RunConfig, images: int) -> RunConfig:
    """A configuration with so many images a step."""
    return config.model_copy(update={"optim": config.optim.model_copy(update={"global_batch": images})})


def unless_full(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What `function` returns; None where the GPU's memory runs out, with what it had taken given back."""
    found: T | None = None
    try:
        found = function(*args, **kwargs)
    except RuntimeError as error:  # torch's own, cuBLAS's, Triton's
        if not NO_ROOM.search(str(error)):
            raise
    if found is None:  # the traceback is gone by now, and with it what held the tensors
        give_back()
    return found


def give_back() -> None:
    """Returns memory that nobody uses to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_of(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of a GPU's memory in use at most while a call runs, with what lies there already; None on a CPU."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
