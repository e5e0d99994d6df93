"""What is measured and written while training: monitors, alarms, loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.core.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    StrictModel,
)

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class AlarmsConfig(StrictModel):
    """When monitors raise an alarm (docs/monitors.md); null turns a rule off.

    K: objective.prototypes, or the size of the memory bank and the positive.
    """

    patience: Annotated[PositiveInt, Field(description="logged steps in a row for which a sign must be there")] = 4
    from_step: Annotated[
        NonNegativeInt | None,
        Field(description="earlier, alarms on what is learned are silent; default: one epoch, at most 1,000 steps"),
    ] = None
    loss_at_ln_k: Annotated[PositiveFloat | None, Field(description="a self term within this part of ln K of ln K")] = (
        0.002
    )
    entropy_saturated: Annotated[
        Probability | None, Field(description="a teacher's entropy above this part of ln K")
    ] = 0.998
    entropy_collapsed: Annotated[
        Probability | None, Field(description="the entropy of the mean target below this part of ln K")
    ] = 0.05
    targets_constant: Annotated[
        PositiveFloat | None, Field(description="nats that a target tells of its image, below this")
    ] = 1e-3
    center_frozen: Annotated[
        PositiveFloat | None, Field(description="relative change of a center between logged steps, below this")
    ] = 1e-7
    feature_spread: Annotated[
        Probability | None, Field(description="feature_std times the root of the width, below this")
    ] = 0.005
    feature_rank: Annotated[
        PositiveFloat | None, Field(description="effective rank of the centered features, below this")
    ] = 1.1
    feature_rank_fall: Annotated[
        Probability | None, Field(description="the same below this part of the highest that it has held so far")
    ] = 0.1
    cross_to_self: Annotated[
        PositiveFloat | None, Field(description="a branch's weighted cross terms over its self terms, above this")
    ] = 10.0
    gradient_norm: Annotated[
        PositiveFloat | None, Field(description="norm of all gradients of a branch, below this")
    ] = 1e-12
    data_wait: Annotated[
        Probability | None, Field(description="part of the time that the slowest rank waits for data, above this")
    ] = 0.5
    slow_rank: Annotated[
        NonNegativeFloat | None,
        Field(description="a rank's own work takes longer than the others', by more than this part of a step"),
    ] = 0.25


class LoggingConfig(StrictModel):
    """What is written while training."""

    every_steps: Annotated[PositiveInt, Field(description="steps between lines of metrics")] = 10
    loggers: Annotated[
        tuple[LoggerName, ...], Field(description="besides metrics.jsonl; each writes into the run directory")
    ] = ("tensorboard",)
    tensorboard: Annotated[bool, Field(description="false leaves it out of the loggers")] = True
    prometheus: Annotated[
        Path | None, Field(description="textfile for node_exporter's collector, FOLDER/NAME.prom")
    ] = None
    monitors: Annotated[bool, Field(description="signs of collapse, gradients and updates of every branch")] = True
    histograms_every: Annotated[
        PositiveInt | None, Field(description="logged steps from one histogram to the next; null: none")
    ] = 10
    pictures_every_epochs: Annotated[
        PositiveInt | None, Field(description="epochs from one grid of current views to the next; null: none")
    ] = 10
    alarms: AlarmsConfig = AlarmsConfig()
    on_alarm: Annotated[
        str | None, Field(description="shell command for every new alarm; MOKD_RUN, MOKD_STEP, MOKD_ALARM, MOKD_ADVICE")
    ] = None

    @property
    def chosen(self) -> tuple[LoggerName, ...]:
        """The loggers that are written to, each once."""
        names = dict.fromkeys(self.loggers)
        return tuple(name for name in names if name != "tensorboard" or self.tensorboard)
