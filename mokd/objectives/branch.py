"""A branch: a student, its teacher, and the student's optimiser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mokd.config import BranchConfig
from mokd.distributed.sharding import piece
from mokd.models.backbones import Backbone
from mokd.models.trainable import TrainableNetwork
from mokd.optim.loss_scale import LossScale
from mokd.optim.optimizer import BranchOptimizer


@dataclass
class BranchLoss:
    """What an objective says of a branch after a forward pass.

    total: the scalar to differentiate; terms: every loss term by itself, detached; monitors: gives further scalars
    to log, computed only at the steps that are logged.
    """

    total: Tensor
    terms: dict[str, Tensor]
    monitors: Callable[[], dict[str, Tensor]]


def mean_loss(so_far: list[BranchLoss] | None, losses: list[BranchLoss], parts: int) -> list[BranchLoss]:
    """The detached mean over a step's micro-batches, built up part by part; the monitors are those of the last one."""
    mean = []
    for i, loss in enumerate(losses):
        total = loss.total.detach() / parts
        terms = {name: value / parts for name, value in loss.terms.items()}
        if so_far is not None:
            total = so_far[i].total + total
            terms = {name: so_far[i].terms[name] + value for name, value in terms.items()}
        mean.append(BranchLoss(total, terms, loss.monitors))
    return mean


class Branch:
    """One network under training.

    student, teacher: the bare modules, as saved. The rest is what the parallelism wraps or replaces: `forward_student`
    is the student as training calls it, within `accumulating` backward passes leave out the mean over ranks,
    `finish_gradients` completes it after the last one, and `whole_teacher_backbone` gives what evaluations run.
    `loss_scale` is there with fp16.
    """

    def __init__(self, config: BranchConfig, student: TrainableNetwork, teacher: TrainableNetwork) -> None:
        self.config = config
        self.name = config.name
        self.student = student
        self.teacher = teacher
        self.teacher.load_state_dict(student.state_dict())
        self.teacher.requires_grad_(False)
        # in training mode the teacher's BatchNorm uses its own batches and keeps its own running statistics
        self.student.train()
        self.teacher.train()
        self.forward_student: Callable[..., Any] = student
        self.accumulating: Callable[[], AbstractContextManager[None]] = nullcontext
        self.finish_gradients: Callable[[], None] = lambda: None
        self.whole_teacher_backbone: Callable[[], Backbone] = lambda: teacher.backbone
        self.optimizer: BranchOptimizer | None = None
        self.loss_scale: LossScale | None = None

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student`, over parameters only, each rank on its pieces."""
        teacher, student = ([piece(p) for p in network.parameters()] for network in (self.teacher, self.student))
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)
