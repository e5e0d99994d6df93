"""What the trainer asks of an objective. Another one takes a module, a configuration class and a line here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeVar, assert_never

import torch
from torch import Tensor

from mokd.config import BranchConfig, ContrastiveConfig, DinoConfig, RegressionConfig, RunConfig, SeedConfig
from mokd.models.trainable import TrainableNetwork
from mokd.objectives.branch import Branch, BranchLoss, NetworkPair, TeachingBranch
from mokd.objectives.contrastive import ContrastiveObjective
from mokd.objectives.dino import DinoObjective
from mokd.objectives.distillation import DistillationObjective

Taught = TypeVar("Taught")


class Objective(Protocol[Taught]):
    """A training objective over a list of branches. Its state (centres, banks) is in `state_tensors`."""

    def build_network(self, config: BranchConfig, images_per_rank: int, *, student: bool) -> TrainableNetwork:
        """The student (with stochastic depth) or teacher of one branch, with the heads that the objective needs."""
        ...

    def teach(self, branches: Sequence[TeachingBranch], views: Sequence[Tensor], epoch: int) -> Taught:
        """What all teachers say of one batch of groups of views, the global group first.

        Called once for each micro-batch of a step; nothing of the objective changes.
        """
        ...

    def remember(self, taught: Taught) -> None:
        """Keeps what centres and banks will take up of a micro-batch in `commit`."""
        ...

    def constants(self, branches: Sequence[TeachingBranch], epoch: int) -> Hashable:
        """The numbers, beside the configuration's, that `teach` and `loss` compute with in an epoch."""
        ...

    def loss(
        self, branch: Branch, branches: Sequence[TeachingBranch], taught: Taught, views: Sequence[Tensor], epoch: int
    ) -> BranchLoss:
        """The loss of `branch`, one of `branches`, on the batch that all teachers have seen, ready for `backward`.

        Differentiated before the next branch's loss is asked for, it leaves no activations behind by then.
        """
        ...

    def commit(self) -> None:
        """Takes up what the step has shown (centres, banks), after the optimisers' step."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything the objective remembers between steps."""
        ...

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        ...

    def loss_bytes(self, images_per_rank: int) -> int:
        """Bytes on each rank, about, of what the losses keep for the backward pass and the objective from step to step;
        for estimates ahead of a run.
        """
        ...


def build_pair(objective: Objective[Any], config: BranchConfig, images_per_rank: int) -> NetworkPair:
    """Student and teacher of a branch that learns; the student's weights are drawn first."""
    student = objective.build_network(config, images_per_rank, student=True)
    return NetworkPair(student, objective.build_network(config, images_per_rank, student=False))


def build_objective(config: RunConfig, device: torch.device) -> Objective[Any]:
    """The objective that `config.objective.kind` names."""
    names = [branch.name for branch in config.branches]
    match config.objective:
        case DinoConfig():
            return DinoObjective(
                config.objective,
                config.views,
                names,
                device,
                epochs=config.optim.epochs,
                global_batch=config.optim.global_batch,
                frozen_epochs=config.optim.freeze_last_layer_epochs,
                recompute_logits=config.execution.recompute_logits,
                overlap_teachers=config.execution.overlap_teachers,
            )
        case ContrastiveConfig():
            return ContrastiveObjective(
                config.objective,
                config.views,
                names,
                device,
                config.seed,
                config.optim.global_batch,
                config.optim.epochs,
            )
        case SeedConfig() | RegressionConfig():
            return DistillationObjective(config.objective, config.views, config.branches, device, config.seed)
        case _:
            assert_never(config.objective)
