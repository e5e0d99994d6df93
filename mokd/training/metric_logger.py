"""From the loop to metrics, progress line and status; the loop itself stays short."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from mokd.config import RunConfig
from mokd.distributed.agreement import BrokenOffError
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.evaluation.online import OnlineEvaluation
from mokd.loggers.base import Continued, open_loggers
from mokd.monitoring import monitors
from mokd.monitoring.alarm_log import AlarmLog
from mokd.monitoring.monitors import Monitors, OfRank
from mokd.objectives.branch import Branch, TeachingBranch
from mokd.runs.heartbeat import Heartbeat
from mokd.runs.metrics import MetricsWriter, read_metrics
from mokd.runs.progress import TrainingProgress
from mokd.runs.run_directory import RunDirectory
from mokd.training.gallery import Gallery
from mokd.training.step import StepResult

# how long a run that was asked to stop waits for a probe that is under way, and how often it looks meanwhile
STOPPING_SECONDS = 2.0
LOOK_SECONDS = 0.2


class _Pending(NamedTuple):
    """A logged step some of whose numbers are still on their way from the device."""

    step: int
    values: dict[str, float | int]
    numbers: monitors.Pending


class MetricLogger:
    """Collects what a step shows; the first rank writes it every `logging.every_steps` steps.

    On a GPU it is written when the next step is logged, or something is saved: the loop does not wait for numbers.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        epoch_steps: int,
        total_steps: int,
        step: int,
        stop: StopRequest,
        heartbeat: Heartbeat,
    ) -> None:
        self._stop = stop
        self._lock = threading.Lock()  # of what the thread that saves writes too
        self._run, self._attempt, self._config, self._ranks, self._device = run, attempt, config, ranks, device
        self._checkpoint_step = step
        self._step = step
        self._total_steps = total_steps
        self._restart_clock(step)
        self._pending: _Pending | None = None
        self._monitors = Monitors(config, ranks, device)
        self._evaluation = OnlineEvaluation(config, ranks, device, stop, heartbeat.beat)
        if ranks.is_main:
            self._metrics = MetricsWriter(run, attempt, step)
            dropped = {(int(record["step"]), key) for record in self._metrics.dropped for key in record}
            found = Continued(run, config.model_dump(mode="json"), step, self._metrics.kept, dropped)
            self._loggers = open_loggers(config.logging, attempt, found)
            self._alarms = AlarmLog(run, config, epoch_steps, step)
            self._gallery = Gallery(config, epoch_steps, self._loggers)
            self._measured = {(r["step"], key) for r in read_metrics(run.metrics_file) for key in r if "eval/" in key}
            self._progress = TrainingProgress(total_steps, step)
            if step:
                self._progress.say(f"resumed at step {step} of {total_steps}")
            self._status(epoch=0)

    def newest_finite(self) -> dict[str, float | int]:
        """The newest logged step of which every number is finite; nothing where there is none, or on other ranks."""
        if not self._ranks.is_main:
            return {}
        self._write_pending()
        records = [r for r in read_metrics(self._run.metrics_file) if "images_seen" in r]
        return next((r for r in reversed(records) if None not in r.values()), {})

    def waited(self, seconds: float) -> None:
        """Adds time that the loop has spent waiting for data."""
        self._waited += seconds

    def stood_still(self, seconds: float) -> None:
        """Adds time for which training has stood still for a save."""
        self._saving += seconds

    def due(self, step: int) -> bool:
        """Whether the step of this number, counted from 1, is to be logged; the same on all ranks."""
        return step % self._config.logging.every_steps == 0 or step == self._total_steps

    def measured(self, step: int) -> bool:
        """Whether gradients and updates of that step are to be looked at; the same on all ranks."""
        return self._config.logging.monitors and self.due(step)

    def step(self, step: int, epoch: int, branches: Sequence[Branch], done: StepResult) -> None:
        """Takes notice of a finished step; writes it when due."""
        self._step = step
        self._own += done.own_seconds
        if self._ranks.is_main:
            self._write_probe(0.0)
        if not self.due(step):
            if self._ranks.is_main:
                self._progress.at(step)
            return
        self._write_pending()
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        of_rank = OfRank(min(self._waited / elapsed, 1.0), min((self._waited + self._own) / elapsed, 1.0))
        numbers = self._monitors.collect([branch.name for branch in branches], done.losses, done.updates, of_rank)
        if numbers is not None:
            images = self._config.optim.global_batch
            values: dict[str, float | int] = {
                "step": step,
                "epoch": epoch,
                "images_seen": step * images,
                "images_per_second": (step - self._since_step) * images / elapsed,
                **{f"lr/{branch.name}": rate for branch, rate in zip(branches, done.rates, strict=True)},
            }
            if self._saving:
                values["save_stall_seconds"] = round(self._saving, 6)
            for branch in branches:
                if branch.loss_scale is not None:
                    values[f"loss_scale/{branch.name}"] = branch.loss_scale.scale
            self._pending = _Pending(step, values, numbers)
            self._gallery.show(step, epoch)
            if numbers.ready() or step == self._total_steps:
                self._write_pending()
        self._restart_clock(step)

    def _write_pending(self) -> None:
        """Writes the newest logged step, when its numbers have come from the device.

        The loop and the thread that saves both call it: a step is written once, and status by one of them at a time.
        """
        with self._lock:
            pending, self._pending = self._pending, None
            if pending is not None:
                self._write_values(pending)

    def _write_values(self, pending: _Pending) -> None:
        step, values, numbers = pending
        measured = numbers.measured()
        values |= measured.values
        alarms, values["alarms"] = self._alarms.observe({k: v if math.isfinite(v) else None for k, v in values.items()})
        self._write(values)
        every = self._config.logging.histograms_every
        if every is not None and step // self._config.logging.every_steps % every == 0:
            for key, histogram in measured.histograms.items():
                self._loggers.histogram(step, key, histogram)
        self._progress.show(step, values)
        for alarm in alarms:
            self._progress.say(f"step {step}  ALARM {alarm.alarm}: {alarm.advice}")
        self._status(epoch=int(values["epoch"]), images_per_second=values["images_per_second"])

    def _write(self, values: Mapping[str, float | int]) -> None:
        """To the metrics and to all loggers."""
        self._metrics.write(values)
        numbers = {key: value for key, value in values.items() if key != "step" and math.isfinite(value)}
        self._loggers.scalars(int(values["step"]), numbers)

    def evaluated(self, step: int) -> bool:
        """Whether everything that is measured at a step is in the metrics; asked of the first rank."""
        keys = ["knn_top1", *(["linear_top1"] if self._config.evaluation.probe_images else [])]
        wanted = {(step, f"eval/{branch.name}/{key}") for branch in self._config.branches for key in keys}
        return wanted <= self._measured

    def evaluate(self, branches: Sequence[TeachingBranch], step: int) -> bool:
        """k-NN of every branch's teacher; all ranks take part. False where it was broken off, on all of them.

        A linear probe on the same features goes on in a thread of the first rank and is written when it is there.
        """
        if self._ranks.is_main:
            self._write_pending()
            self._write_probe(None)
        began = time.perf_counter()
        try:
            accuracies = self._evaluation.evaluate({b.name: b.whole_teacher_backbone() for b in branches}, step)
        except BrokenOffError:
            if self._ranks.is_main:
                self._progress.say(f"step {step}  evaluation broken off; it is done when the run goes on")
            return False
        if self._ranks.is_main:
            k = self._config.evaluation.knn.headline
            best = {branch: max(found.values()) for branch, found in accuracies.items()}
            self._write_accuracies(step, "knn_top1", "k-NN", best)
            self._write_accuracies(step, f"knn_top1_k{k}", None, {b: found[k] for b, found in accuracies.items()})
        self._since += time.perf_counter() - began  # not part of the training speed
        return True

    def _write_probe(self, wait_seconds: float | None) -> None:
        """Writes the accuracies of the linear probe under way, when they are there within so long.

        None: however long it takes, unless the run is asked to stop.
        """
        result = self._evaluation.probed(0.0 if wait_seconds is None else wait_seconds)
        while wait_seconds is None and self._evaluation.probing and not self._stop.reason:
            result = self._evaluation.probed(LOOK_SECONDS)
        if result is not None:
            self._write_accuracies(result.step, "linear_top1", "linear probe", result.top1)

    def _write_accuracies(self, step: int, key: str, title: str | None, top1: Mapping[str, float]) -> None:
        # an evaluation that is repeated because its probe was broken off has some of it already
        top1 = {branch: v for branch, v in top1.items() if (step, f"eval/{branch}/{key}") not in self._measured}
        if not top1:
            return
        self._measured |= {(step, f"eval/{branch}/{key}") for branch in top1}
        with self._lock:
            self._write({"step": step, **{f"eval/{branch}/{key}": value for branch, value in top1.items()}})
        if title is not None:
            shown = "  ".join(f"{branch} {value:.1f}%" for branch, value in top1.items())
            self._progress.say(f"step {step}  {title} top-1  {shown}")

    def saved(self, step: int) -> None:
        """Notes the newest published checkpoint; the saver calls it, once that is durable."""
        self._checkpoint_step = step

    def flush(self) -> None:
        """Brings the metrics to the disk, ahead of a checkpoint that builds on them."""
        self._write_pending()
        with self._lock:
            self._metrics.flush()
            self._loggers.flush()

    def close(self) -> None:
        """Closes files and the progress line."""
        if self._ranks.is_main:
            self._write_pending()
            if self._step == self._total_steps:
                self._write_probe(None)
            self._write_probe(STOPPING_SECONDS)  # a run that is asked to stop has little time
            self._progress.close()
            self._gallery.close()
            self._metrics.close()
            self._loggers.close()

    def _restart_clock(self, step: int) -> None:
        self._since, self._since_step = time.perf_counter(), step
        self._waited = self._saving = self._own = 0.0

    def _status(self, **facts: float | int) -> None:
        self._run.write_status(
            "running",
            self._attempt,
            step=self._step,
            total_steps=self._total_steps,
            checkpoint_step=self._checkpoint_step,
            world_size=self._ranks.world_size,
            host=socket.gethostname(),
            **facts,
        )
