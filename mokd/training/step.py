"""One step of every branch: forward and backward passes over the micro-batches, agreement of the ranks, updates."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mokd.config import RunConfig
from mokd.distributed.agreement import Agreement
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.models.drop_path import micro_batch
from mokd.monitoring.updates import UpdateMeter
from mokd.objectives.base import Objective
from mokd.objectives.branch import Branch, BranchLoss, TeachingBranch, learning, mean_loss
from mokd.optim.loss_scale import any_overflow
from mokd.optim.schedules import cosine
from mokd.parallel.build import is_recorded
from mokd.runs.seeds import derive_seed
from mokd.training.graph_passes import GraphPasses
from mokd.training.passes import Passes

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss term is NaN or infinite; the optimisers have not stepped. The same would happen again: no restart helps.

    step: counted from 1. terms: names such as `loss/<branch>/<term>`. own: this rank's value of every term.
    """

    final = True

    def __init__(self, step: int, terms: Sequence[str], own: Mapping[str, float]) -> None:
        super().__init__(f"step {step}: {', '.join(terms)} not finite; stopped before the optimiser step")
        self.step, self.terms, self.own = step, list(terms), dict(own)


class StepResult(NamedTuple):
    """What a step shows: a loss and a learning rate per branch, and whether all ranks agree to stop after it.

    updates: of a measured step, `UpdateMeter`'s numbers by branch. own_seconds: what the host did without the others.
    """

    losses: list[BranchLoss]
    rates: list[float]
    stopping: bool
    updates: dict[str, dict[str, Tensor]]
    own_seconds: float


def seed_branch(seed: int, step: int, branch: str) -> None:
    """Seeds what torch draws for a branch in a step, on all ranks and for every micro-batch alike.

    Each step and branch by itself: no random state is saved, and a branch draws the same alone as in company.
    """
    torch.manual_seed(derive_seed(seed, "step", step, branch))


class TrainingStep:
    """Trains branches on one batch after another; nothing is remembered from step to step but their state.

    learning: those of them that are not frozen, in whose order losses and rates are given.
    """

    def __init__(
        self,
        config: RunConfig,
        branches: Sequence[TeachingBranch],
        objective: Objective[Any],
        stop: StopRequest,
        ranks: Ranks,
        device: torch.device,
        epoch_steps: int,
    ) -> None:
        self.config, self.branches, self.objective = config, branches, objective
        self.learning = learning(branches)
        self.stop, self.ranks, self.device = stop, ranks, device
        self.epoch_steps = epoch_steps
        kind = GraphPasses if is_recorded(config, device) else Passes
        self._passes = kind(config, branches, objective, device)

    def run(self, step: int, groups: Sequence[Tensor], epoch: int, *, measure: bool = False) -> StepResult:
        """Step number `step`, from 0, on this rank's groups of views `[V_g, B, 3, S_g, S_g]`.

        measure: look at gradients and updates too, which changes none of them; the same on all ranks.
        """
        losses, agreement = self._gradients(step, groups, epoch)
        stopping = self._heed(step, agreement)
        began = time.perf_counter()
        rates, updates = self._update(step, measure)
        own_seconds = time.perf_counter() - began
        self.objective.commit()
        return StepResult(losses, rates, stopping, updates, own_seconds)

    def _gradients(self, step: int, groups: Sequence[Tensor], epoch: int) -> tuple[list[BranchLoss], Agreement]:
        """Forward and backward passes over all micro-batches: the mean losses, and what the ranks agree on."""
        parts = self.config.optim.accumulate
        so_far: list[BranchLoss] | None = None
        for index in range(parts):
            last = index + 1 == parts
            with ExitStack() as stack:
                stack.enter_context(micro_batch(index, parts))
                if not last:  # one mean over ranks a step
                    for branch in self.learning:
                        stack.enter_context(branch.accumulating())
                views = [group.chunk(parts, dim=1)[index] for group in groups]
                losses: list[BranchLoss] = []
                taught = self._passes.teach(views, epoch)
                self.objective.remember(taught)
                for branch in self.learning:
                    seed_branch(self.config.seed, step, branch.name)
                    losses.append(self._passes.loss(branch, taught, views, epoch))
                    if len(losses) == len(self.learning):
                        so_far = mean_loss(so_far, losses, parts)
                        if last:
                            # asked ahead of the last backward pass, whose work covers the answer's way to the host
                            agreement = self._ask(so_far)
                    scale = branch.loss_scale.scale if branch.loss_scale else 1.0
                    # at once: the activations of one branch are gone before those of the next exist
                    self._passes.backward(branch, losses[-1], scale / parts)
        assert so_far is not None
        return so_far, agreement

    def _update(self, step: int, measure: bool) -> tuple[list[float], dict[str, dict[str, Tensor]]]:
        """Optimiser and teacher of every branch: learning rates, measures. One with an overflow stands still."""
        taken = []
        for branch in self.learning:
            branch.finish_gradients()
            taken.append(branch.optimizer.take_gradients(step))
        overflowed = [False] * len(taken)
        if self.config.precision.compute == "fp16":
            overflowed = any_overflow(taken)
            for branch, gradients in zip(self.learning, taken, strict=True):
                assert branch.loss_scale is not None
                torch._foreach_mul_(gradients, 1.0 / branch.loss_scale.scale)
        steps = self.config.optim.epochs * self.epoch_steps
        momentum = cosine(step, steps, *self.config.optim.teacher_momentum)
        rates, updates = [], {}
        for branch, overflow in zip(self.learning, overflowed, strict=True):
            if branch.loss_scale is not None:
                branch.loss_scale.update(overflow)
            if overflow:
                self._skip(branch, step)
                rates.append(branch.optimizer.schedule(step))
                continue
            meter = UpdateMeter(branch.optimizer) if measure else None
            rates.append(branch.optimizer.step(step))
            branch.update_teacher(momentum)
            if meter is not None:
                updates[branch.name] = meter.finish()
        return rates, updates

    def _skip(self, branch: Branch, step: int) -> None:
        """Student, optimiser and teacher stay as they are: the average is over states that a student has reached."""
        assert branch.loss_scale is not None
        branch.optimizer.drop_gradients()
        if self.ranks.is_main:
            log.warning(
                "step %d: the gradients of %s overflow fp16; this step of it is skipped, its loss scale is %g now",
                *(step + 1, branch.name, branch.loss_scale.scale),
            )

    def _ask(self, losses: Sequence[BranchLoss]) -> Agreement:
        """Of all ranks: whether anybody was asked to stop, and whether every loss term is finite."""
        self._terms = {
            f"loss/{branch.name}/{term}": value
            for branch, loss in zip(self.learning, losses, strict=True)
            for term, value in [*loss.terms.items(), ("total", loss.total)]
        }
        return Agreement(self._terms, self.stop.reason is not None, self.device)

    def _heed(self, step: int, agreement: Agreement) -> bool:
        """Whether to stop after this step, the same on all ranks. NonFiniteLossError before the optimisers step."""
        stopping, broken = agreement.answer()
        if broken:
            raise NonFiniteLossError(step + 1, broken, {name: float(term) for name, term in self._terms.items()})
        if stopping:
            self.stop.request("another rank was asked to stop")
        return stopping
