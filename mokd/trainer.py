"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch

from data_pipeline.batch import ViewBatch
from data_pipeline.loader import build_loader
from mokd import checkpoint, state
from mokd.agreement import Agreement
from mokd.branch import Branch, BranchLoss
from mokd.compilation import compile_branch
from mokd.config import RunConfig
from mokd.distributed import Ranks, barrier
from mokd.objective import build_objective
from mokd.optim import BranchOptimizer
from mokd.parallel import parallelise
from mokd.preflight import images_per_rank
from mokd.reporting import Reporter
from mokd.run_directory import RunDirectory
from mokd.schedules import cosine
from mokd.seeds import derive_seed
from mokd.stopping import StopRequest


@dataclass(frozen=True)
class Outcome:
    """How a stretch of training ended, and after how many steps of the run."""

    state: Literal["done", "stopped"]
    step: int
    reason: str


class NonFiniteLossError(RuntimeError):
    """A loss term is NaN or infinite; the optimisers have not stepped."""


class Trainer:
    """Trains all branches of a run from its newest checkpoint to its end, or to a request to stop."""

    def __init__(
        self, run: RunDirectory, config: RunConfig, ranks: Ranks, device: torch.device, stop: StopRequest, attempt: int
    ) -> None:
        self.run, self.config, self.ranks, self.device, self.stop = run, config, ranks, device, stop
        self.attempt = attempt
        self.loader = build_loader(
            config.data,
            config.views,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            global_batch=config.optim.global_batch,
            device=device,
        )
        self.epoch_steps = self.loader.steps_per_epoch
        self.total_steps = config.total_steps(self.epoch_steps)
        self.objective = build_objective(config, device)
        self.branches = [self._build_branch(i) for i in range(len(config.branches))]
        self.identity = state.identity(config, self.loader.dataset_size)
        self.step = self._resume()
        self.report = Reporter(run, attempt, config, ranks, device, self.total_steps, self.step)

    def _build_branch(self, index: int) -> Branch:
        branch_config = self.config.branches[index]
        # seeded by name: a branch starts from the same weights in a pair and alone
        torch.manual_seed(derive_seed(self.config.seed, "initial weights", branch_config.name))
        branch = self.objective.build_branch(branch_config, images_per_rank(self.config, self.ranks.world_size))
        if self.config.execution.compile:
            compile_branch(branch)
        parallelise(branch, self.config.parallel, self.device)
        branch.optimizer = BranchOptimizer(
            branch.student, branch_config, self.config.optim, self.config.lr_scale, self.epoch_steps
        )
        return branch

    def _resume(self) -> int:
        """Restores the newest whole checkpoint, if any, and returns the number of steps that are done."""
        found = checkpoint.newest(self.run)
        if found is None:
            return 0
        state.check_identity(found, self.identity)
        state.restore(found, self.branches, self.objective)
        return found.step

    def fit(self) -> Outcome:
        """Trains to the end or to the step at which all ranks agree to stop; saves there either way."""
        with closing(self.loader), closing(self.report):
            if self.step == 0:
                self.report.evaluate(self.branches, 0)
            stopping = self.step >= self.total_steps
            while not stopping:
                epoch, start = divmod(self.step, self.epoch_steps)
                with closing(self._batches(epoch, start)) as batches:
                    for batch in batches:
                        stopping = self._train_step(batch, epoch)
                        at_epoch_end = self.step % self.epoch_steps == 0
                        finished = self.step >= self.total_steps
                        if finished or (at_epoch_end and self._evaluation_due(self.step // self.epoch_steps)):
                            self.report.evaluate(self.branches, self.step)
                        stopping = stopping or finished
                        if (stopping or self._save_due()) and not self._save() and stopping:
                            raise OSError(f"step {self.step}: the last checkpoint could not be saved")
                        if stopping:
                            break
            barrier()  # nobody leaves before the checkpoint of the last step is published
        if self.step >= self.total_steps:
            return Outcome("done", self.step, "all steps done")
        return Outcome("stopped", self.step, self.stop.reason or "asked to stop")

    def _batches(self, epoch: int, start: int) -> Generator[ViewBatch]:
        """Batches of an epoch, with the time spent waiting for each reported."""
        with closing(self.loader.epoch(epoch, start)) as batches:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                self.report.waited(time.perf_counter() - began)
                if batch is None:
                    return
                yield batch

    def _train_step(self, batch: ViewBatch, epoch: int) -> bool:
        """One step of every branch; returns whether all ranks agree to stop after it."""
        # all ranks alike, and a function of the step alone: there is no random state to save
        torch.manual_seed(derive_seed(self.config.seed, "step", self.step))
        losses, agreement = self._differentiate(batch, epoch)
        stopping = self._check(agreement)
        rates = [self._update(branch) for branch in self.branches]
        self.objective.commit()
        self.step += 1
        self.report.step(self.step, epoch, self.branches, losses, rates)
        return stopping

    def _update(self, branch: Branch) -> float:
        assert branch.optimizer is not None
        rate = branch.optimizer.step(self.step)
        steps = self.config.optim.epochs * self.epoch_steps
        branch.update_teacher(cosine(self.step, steps, *self.config.optim.teacher_momentum))
        return rate

    def _differentiate(self, batch: ViewBatch, epoch: int) -> tuple[list[BranchLoss], Agreement]:
        """Gradients, branch by branch: the activations of one are gone before those of the next exist."""
        losses: list[BranchLoss] = []
        pending = self.objective.losses(self.branches, batch.views, epoch)
        for number in range(len(self.branches)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision.compute == "bf16"):
                losses.append(next(pending))
            if number + 1 == len(self.branches):
                # asked before the last backward pass is enqueued, whose work covers the answer's way to the host
                agreement = self._ask(losses)
            losses[-1].total.backward()
        return losses, agreement

    def _ask(self, losses: Sequence[BranchLoss]) -> Agreement:
        """Of all ranks: whether anybody was asked to stop, and whether every loss term is finite."""
        terms = {
            f"loss/{branch.name}/{term}": value
            for branch, loss in zip(self.branches, losses, strict=True)
            for term, value in [*loss.terms.items(), ("total", loss.total)]
        }
        return Agreement(terms, self.stop.reason is not None, self.device)

    def _check(self, agreement: Agreement) -> bool:
        """Whether all ranks stop after this step."""
        stopping, broken = agreement.answer()
        if broken:
            raise NonFiniteLossError(
                f"step {self.step + 1}: {', '.join(broken)} not finite; stopped before the optimiser step. "
                "Resume from the newest checkpoint with a lower learning rate or precision.compute=fp32"
            )
        if stopping:
            self.stop.request("another rank was asked to stop")
        return stopping

    def _evaluation_due(self, epochs_done: int) -> bool:
        every = self.config.evaluation.every_epochs
        return every is not None and epochs_done % every == 0

    def _save_due(self) -> bool:
        return self.step % (self.config.checkpoint.every_steps or self.epoch_steps) == 0

    def _save(self) -> bool:
        """Publishes a checkpoint of the current step; every rank's state is the same, so the first writes it.

        False where the disk is full: training goes on, but a run must not end without its last checkpoint.
        """
        if not self.ranks.is_main:
            return True
        self.report.flush()
        snapshot = state.collect(self.branches, self.objective)
        facts = {"identity": self.identity, "epoch": self.step // self.epoch_steps, "world_size": self.ranks.world_size}
        if not checkpoint.publish(self.run, self.attempt, self.step, snapshot, facts):
            return False
        keep = self.config.checkpoint
        checkpoint.prune(self.run, keep.keep_last, keep.keep_every_steps)
        self.report.saved(self.step)
        return True
