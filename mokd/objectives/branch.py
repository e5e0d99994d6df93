"""A branch: a teacher and, unless it is frozen, the student that learns, its optimizer, how training calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mokd.config import BranchConfig
from mokd.distributed.sharding import piece
from mokd.losses.kernels.targets import at_least_fp32
from mokd.models.backbones import Backbone
from mokd.models.trainable import TrainableNetwork
from mokd.optim.loss_scale import LossScale
from mokd.optim.optimizer import BranchOptimizer


@dataclass(frozen=True)
class Observation:
    """What a branch shows of the images of this rank, for monitors.

    features `[B, D]`: of the student, L2-normalized, first view. entropies: by head, of every image's targets `[B]` in
    nats. mean_targets: by head, over images and views `[K]`. centers: by head, the objective's own tensors `[K]`.
    scalars: further numbers, means over images.
    """

    features: Tensor
    entropies: dict[str, Tensor] = field(default_factory=dict)
    mean_targets: dict[str, Tensor] = field(default_factory=dict)
    centers: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def normalized_features(pooled: Tensor) -> Tensor:
    """Features `[B, D]` as an observation has them."""
    return torch.nn.functional.normalize(at_least_fp32(pooled), dim=-1)


@dataclass
class BranchLoss:
    """What an objective says of a branch after a forward pass.

    total: the scalar to differentiate, the sum of terms times weights; terms: every loss term by itself, detached;
    observe: looks at the step, called only where that is logged, after the updates and ahead of the next step.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    observe: Callable[[], Observation]


def mean_loss(so_far: list[BranchLoss] | None, losses: list[BranchLoss], parts: int) -> list[BranchLoss]:
    """The detached mean over a step's micro-batches, built up part by part; what is observed is the last one."""
    mean = []
    for i, loss in enumerate(losses):
        total = loss.total.detach() / parts
        terms = {name: value / parts for name, value in loss.terms.items()}
        if so_far is not None:
            total = so_far[i].total + total
            terms = {name: so_far[i].terms[name] + value for name, value in terms.items()}
        mean.append(BranchLoss(total, terms, loss.weights, loss.observe))
    return mean


class NetworkPair:
    """Student and teacher as bare modules, as they are saved. The teacher starts as a copy and gets no gradient."""

    def __init__(self, student: TrainableNetwork, teacher: TrainableNetwork) -> None:
        self.student, self.teacher = student, teacher
        teacher.load_state_dict(student.state_dict())
        teacher.requires_grad_(False)
        # in training mode the teacher's BatchNorm uses its own batches and keeps its own running statistics
        student.train()
        teacher.train()


class ParallelCalls(NamedTuple):
    """How a pair of networks is called where ranks share the work.

    forward_student: the student as training calls it; within `accumulating`, backward passes leave out the mean over
    ranks; `finish_gradients` completes it after the last one; `whole_teacher_backbone` gives what evaluations run.
    """

    forward_student: Callable[..., Any]
    whole_teacher_backbone: Callable[[], Backbone]
    accumulating: Callable[[], AbstractContextManager[None]] = nullcontext
    finish_gradients: Callable[[], None] = lambda: None


def single_process(pair: NetworkPair) -> ParallelCalls:
    """The calls where there are no other ranks: the bare modules."""
    return ParallelCalls(pair.student, lambda: pair.teacher.backbone)


class TeachingBranch:
    """A branch as others see it: a network that gives targets. A frozen branch is this and nothing more."""

    def __init__(
        self, config: BranchConfig, teacher: TrainableNetwork, whole_teacher_backbone: Callable[[], Backbone]
    ) -> None:
        self.config, self.name = config, config.name
        self.teacher, self.whole_teacher_backbone = teacher, whole_teacher_backbone


def freeze(network: TrainableNetwork) -> TrainableNetwork:
    """A frozen branch's network: no gradients, and in evaluation mode, so that its BatchNorm keeps its statistics."""
    return network.requires_grad_(False).eval()


class Branch(TeachingBranch):
    """One network under training. `loss_scale` is there with fp16; `calls` are those of `ParallelCalls`."""

    def __init__(
        self,
        config: BranchConfig,
        pair: NetworkPair,
        calls: ParallelCalls,
        optimizer: BranchOptimizer,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(config, pair.teacher, calls.whole_teacher_backbone)
        self.student, self.forward_student = pair.student, calls.forward_student
        self.accumulating, self.finish_gradients = calls.accumulating, calls.finish_gradients
        self.optimizer, self.loss_scale = optimizer, loss_scale

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student`, over parameters, each rank on its pieces.

        BatchNorm's statistics are a teacher's own, unless it sees no batches; then they follow the student's likewise.
        """
        teacher, student = ([piece(p) for p in network.parameters()] for network in (self.teacher, self.student))
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)
        if not self.teacher.sees_batches:
            for mine, theirs in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(theirs, 1.0 - momentum)
                else:
                    mine.copy_(theirs)


def learning(branches: Iterable[TeachingBranch]) -> list[Branch]:
    """Those that are under training."""
    return [branch for branch in branches if isinstance(branch, Branch)]
