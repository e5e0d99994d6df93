"""Our step on a synthetic batch that lies on the device, and what both contenders start from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.objectives.base import build_objective
from mokd.optim.schedules import cosine
from mokd.parallel.build import build_branch
from mokd.training.feasibility import images_per_rank
from mokd.training.step import TrainingStep

EPOCH_STEPS = 1000
FIRST_STEP = 40 * EPOCH_STEPS  # past the freeze and the warm-ups of rates and temperatures


class Pair:
    """A configuration's branches, as training builds them, and the synthetic batch of this rank."""

    def __init__(self, config: RunConfig, device: torch.device, world_size: int = 1, rank: int = 0) -> None:
        self.config, self.device = config, device
        self.objective = build_objective(config, device)
        self.images = images_per_rank(config, world_size)
        self.epoch = FIRST_STEP // EPOCH_STEPS
        self.branches = [
            build_branch(config, b, self.objective, device, images_per_rank=self.images, epoch_steps=EPOCH_STEPS)
            for b in config.branches
        ]
        generator = torch.Generator().manual_seed(rank)
        shapes = [(g.count, self.images, 3, g.size_px, g.size_px) for g in config.views.groups]
        self.views = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the configuration."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision.compute == "bf16")

    def momentum(self, step: int) -> float:
        """Of the teacher's average."""
        return cosine(step, self.config.optim.epochs * EPOCH_STEPS, *self.config.optim.teacher_momentum)


class OurStep:
    """The step of training, without a loader and without files; `clock` hears of its phases."""

    def __init__(self, pair: Pair, clock: Clock | None = None) -> None:
        self.pair = pair
        device, ranks = pair.device, Ranks()
        config = pair.config
        if clock is not None:  # it waits at every border, which a recording may not
            execution = config.execution.model_copy(update={"cuda_graphs": False})
            config = config.model_copy(update={"execution": execution})
        self.step = TrainingStep(config, pair.branches, pair.objective, StopRequest(), ranks, device, EPOCH_STEPS)
        clock = clock or Clock(device, silent=True)
        for branch in pair.branches:
            teacher, optimizer = branch.teacher, branch.optimizer
            clock.time(branch, "forward_student", "student_forward")
            clock.time(teacher, "forward", "teacher_forward")
            clock.time(teacher, "search", "teacher_forward")
            clock.time(optimizer, "step", "optimizer")
            clock.time(branch, "update_teacher", "teacher_average")
        clock.time(pair.objective, "commit", "centers")
        clock.time(pair.objective, "teach", "loss")
        clock.time(pair.objective, "loss", "loss")
        clock.time(self.step, "run", "backward")  # what is left of a step

    def __call__(self, views: Sequence[Tensor], step: int) -> list[dict[str, Tensor]]:
        """One step; every term of every branch, not read yet."""
        done = self.step.run(step, views, self.pair.epoch)
        return [{"total": loss.total.detach(), **loss.terms} for loss in done.losses]


class Clock:
    """Milliseconds per phase, without those of the phases inside it. Waits for the device at every border."""

    def __init__(self, device: torch.device, *, silent: bool = False) -> None:
        self.device, self.silent = device, silent
        self.ms: dict[str, float] = {}
        self._inner: list[float] = []

    def time(self, owner: Any, method: str, name: str) -> None:
        """Has a method's time added to a phase."""
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with the time it takes added to a phase."""
        if self.silent:
            return function

        def measured(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            began = time.perf_counter()
            self._inner.append(0.0)
            result = function(*args, **kwargs)
            synchronise(self.device)
            spent = 1e3 * (time.perf_counter() - began)
            self.ms[name] = self.ms.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent
            return result

        return measured


def synchronise(device: torch.device) -> None:
    """Waits for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
