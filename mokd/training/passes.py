"""What the networks do in a step: the teachers' pass, and every branch's forward and backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mokd.config import RunConfig
from mokd.objectives.base import Objective
from mokd.objectives.branch import Branch, BranchLoss, TeachingBranch
from mokd.optim.precision import autocast


class Passes:
    """The passes as they are, one micro-batch after another: `teach`, then of each branch `loss` and `backward`.

    views: this rank's groups `[V_g, B, 3, S_g, S_g]`.
    """

    def __init__(
        self, config: RunConfig, branches: Sequence[TeachingBranch], objective: Objective[Any], device: torch.device
    ) -> None:
        self._precision, self._device = config.precision, device
        self._branches, self._objective = branches, objective

    def teach(self, views: Sequence[Tensor], epoch: int) -> Any:
        """What all teachers say."""
        with autocast(self._precision, self._device):
            return self._objective.teach(self._branches, views, epoch)

    def loss(self, branch: Branch, taught: Any, views: Sequence[Tensor], epoch: int) -> BranchLoss:
        """The forward pass of a student; what torch draws in it depends on the seed set before."""
        with autocast(self._precision, self._device):
            return self._objective.loss(branch, self._branches, taught, views, epoch)

    def backward(self, branch: Branch, loss: BranchLoss, scale: float) -> None:
        """The gradients of `scale` times the loss, into the student's parameters."""
        (loss.total * scale).backward()
