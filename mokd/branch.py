"""A branch: a student, its teacher, and the student's optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mokd.config import BranchConfig
from mokd.optim import BranchOptimizer


@dataclass
class BranchLoss:
    """What an objective says of a branch after a forward pass.

    total: the scalar to differentiate; terms: every loss term by itself, detached; monitors: gives further scalars
    to log, computed only at the steps that are logged.
    """

    total: Tensor
    terms: dict[str, Tensor]
    monitors: Callable[[], dict[str, Tensor]]


class Branch:
    """One network under training.

    student, teacher: the bare modules, as saved and evaluated. `forward_student` is the student as the parallelism
    wraps it; training calls that one.
    """

    def __init__(self, config: BranchConfig, student: nn.Module, teacher: nn.Module) -> None:
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
        self.optimizer: BranchOptimizer | None = None

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student`, over parameters only."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)
