"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from data_pipeline.loaders.batch import ViewBatch
from data_pipeline.loaders.build import build_loader
from mokd.checkpointing import changes, choose, state
from mokd.checkpointing.async_writer import AsyncCheckpointer
from mokd.checkpointing.reading import Checkpoint
from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks, barrier, broadcast_from_main, decided_by_main, set_timeout
from mokd.distributed.stopping import StopRequest
from mokd.objectives.base import build_objective
from mokd.optim.precision import set_arithmetic, view_dtype
from mokd.parallel.build import build_branch
from mokd.runs.heartbeat import Heartbeat, Phase
from mokd.runs.run_directory import RunDirectory
from mokd.training import failure_report
from mokd.training.feasibility import data_identity, images_per_rank
from mokd.training.metric_logger import MetricLogger
from mokd.training.step import NonFiniteLossError, TrainingStep
from mokd.weights import initial


@dataclass(frozen=True)
class Outcome:
    """How a stretch of training ended, and after how many steps of the run."""

    state: Literal["done", "stopped"]
    step: int
    reason: str

    def facts(self) -> dict[str, Any]:
        """For `status.json`: a stretch ends with a save, or with the one that it began from."""
        return {"step": self.step, "checkpoint_step": self.step, "reason": self.reason}


class Trainer:
    """Trains all branches of a run from its newest checkpoint to its end, or to a request to stop."""

    def __init__(
        self,
        run: RunDirectory,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        stop: StopRequest,
        attempt: int,
        heartbeat: Heartbeat,
    ) -> None:
        self.heartbeat = heartbeat
        self.run, self.config, self.ranks, self.device, self.stop = run, config, ranks, device, stop
        self.attempt = attempt
        set_arithmetic(config.precision)
        heartbeat.part("loader")
        self.loader = build_loader(
            config.data,
            config.views,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            global_batch=config.optim.global_batch,
            device=device,
            dtype=view_dtype(config.precision, device),
        )
        self.epoch_steps = self.loader.steps_per_epoch
        self.total_steps = config.total_steps(self.epoch_steps)
        # one rank looks and verifies, while all build
        search = choose.begin_search(run, self._save_interval()) if ranks.is_main else None
        heartbeat.part("networks")
        self.objective = build_objective(config, device)
        images = images_per_rank(config, ranks.world_size)
        self.branches = [
            build_branch(config, b, self.objective, device, images_per_rank=images, epoch_steps=self.epoch_steps)
            for b in config.branches
        ]
        self.training_step = TrainingStep(config, self.branches, self.objective, stop, ranks, device, self.epoch_steps)
        self.identity = state.identity(config, decided_by_main(lambda: data_identity(config)))
        self.step = self._resume(search)
        heartbeat.part("metrics")
        extent = (self.epoch_steps, self.total_steps, self.step)
        self.report = MetricLogger(run, attempt, config, ranks, device, *extent, stop, heartbeat)
        self.checkpointer = AsyncCheckpointer(run, attempt, config.checkpoint, self.report.flush, self.report.saved)

    def _resume(self, search: Callable[[], Checkpoint | None] | None) -> int:
        """Restores the newest whole checkpoint, if any, and returns the number of steps that are done."""
        self.heartbeat.part("checkpoint")
        # the other ranks take the one that it has found, and read only what they need
        found = decided_by_main(lambda: search() if search else None)
        if found is None:
            initial.load(self.run, self.config, self.branches)
            return 0
        state.check_identity(found, self.identity)
        if self.ranks.is_main:
            changes.record(self.run, self.attempt, found, state.changeable(self.config))
        self.heartbeat.part("restore")
        state.restore(found, self.branches, self.objective)
        return found.step

    def fit(self) -> Outcome:
        """Trains to the end or to the step at which all ranks agree to stop; saves there either way."""
        with closing(self.loader), closing(self.report), closing(self.checkpointer):
            # what a stop has broken off is done now, ahead of further steps
            stopping = not self._evaluate() or self.step >= self.total_steps
            self.heartbeat.part("first batch")
            while not stopping:
                epoch, start = divmod(self.step, self.epoch_steps)
                with closing(self._batches(epoch, start)) as batches:
                    for batch in batches:
                        asked = self._train_step(batch, epoch)
                        stopping = asked or self.step >= self.total_steps
                        if stopping or self._save_due() or self._evaluation_due():
                            # ahead of an evaluation, which may take long and costs no step
                            with self._phase("save"):
                                self._save(last=stopping)
                        if not asked and not self._evaluate():
                            stopping = True
                        self.checkpointer.check()
                        if stopping:
                            break
            self.heartbeat.phase("save", self.step)
            if self.ranks.is_main:
                self._wait_for_the_save()
            barrier()  # nobody leaves before the newest checkpoint is published
            self.heartbeat.phase("evaluate", self.step)  # the first rank may still wait for a probe
        if self.step >= self.total_steps and not (self.stop.reason and self._evaluation_missing()):
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
        if self.heartbeat.current == "start":
            if self.config.execution.compile:
                self.heartbeat.phase("compile", self.step)
            self.heartbeat.part("first step")
        try:
            done = self.training_step.run(self.step, batch.views, epoch, measure=self.report.measured(self.step + 1))
        except NonFiniteLossError as error:
            monitors = self.report.newest_finite()
            text = failure_report.write(self.run, error, batch, self.training_step.learning, self.ranks, monitors)
            error.args = (text,)
            raise
        self.step += 1
        if self.heartbeat.current in ("start", "compile"):
            set_timeout(self.config.parallel.timeout_seconds)
        self.heartbeat.phase("step", self.step)
        self.report.step(self.step, epoch, self.training_step.learning, done)
        return done.stopping

    def _evaluation_due(self) -> bool:
        """Whether the networks of this step are evaluated: before the first, at the end, and every so many epochs."""
        every = self.config.evaluation.every_epochs
        if every is None:
            return False
        return self.step >= self.total_steps or self.step % (every * self.epoch_steps) == 0

    def _evaluation_missing(self) -> bool:
        return self.ranks.is_main and self._evaluation_due() and not self.report.evaluated(self.step)

    def _evaluate(self) -> bool:
        """Evaluates where it is due and has not been done; False where all ranks agreed to break it off and stop."""
        if not self._evaluation_due() or not broadcast_from_main(self._evaluation_missing()):
            return True
        with self._phase("evaluate"):
            return self.report.evaluate(self.branches, self.step)

    @contextmanager
    def _phase(self, phase: Phase) -> Generator[None]:
        """Within it the rank is in `phase`, then again in the one before."""
        before = self.heartbeat.current
        self.heartbeat.phase(phase, self.step)
        yield
        self.heartbeat.phase(before, self.step)

    def _save_due(self) -> bool:
        return self.step % self._save_interval() == 0

    def _save_interval(self) -> int:
        return self.config.checkpoint.every_steps or self.epoch_steps

    def _save(self, *, last: bool) -> None:
        """Saves the current step; the first rank writes, the others at most give their pieces.

        A full disk is no reason to stop training, but a run must not end without its last checkpoint.
        """
        began = time.perf_counter()
        if self.ranks.is_main:
            self.checkpointer.wait()  # one copy in host memory at a time
        copying = time.perf_counter()
        if self.ranks.is_main or state.is_sharded(self.branches):
            snapshot = state.collect(self.branches, self.objective, main=self.ranks.is_main)
        if not self.ranks.is_main:
            return
        facts = {
            "identity": self.identity,
            "changeable": state.changeable(self.config),
            "epoch": self.step // self.epoch_steps,
            "world_size": self.ranks.world_size,
            "copy_seconds": round(time.perf_counter() - copying, 3),
        }
        self.checkpointer.save(self.step, snapshot, facts)
        if last:
            self._wait_for_the_save()
        self.report.stood_still(time.perf_counter() - began)

    def _wait_for_the_save(self) -> None:
        if not self.checkpointer.wait():
            raise OSError(f"step {self.step}: the last checkpoint could not be saved")
