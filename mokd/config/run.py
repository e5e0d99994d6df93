"""A whole run: every section but the launcher's own, with the paper's values as defaults."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.core import schema
from data_pipeline.core.schema import NonNegativeInt, StrictModel
from mokd.config.branches import BranchConfig
from mokd.config.evaluation import EvaluationConfig, TransferConfig
from mokd.config.execution import (
    CheckpointConfig,
    ExecutionConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
)
from mokd.config.logging import LoggingConfig
from mokd.config.objectives import AnyObjectiveConfig, DinoConfig


class RunConfig(StrictModel):
    """A whole run. `cluster` is the launcher's: it is carried along here and validated there."""

    name: str
    seed: NonNegativeInt = 0
    objective: AnyObjectiveConfig = DinoConfig()
    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)]
    optim: OptimConfig = OptimConfig()
    precision: PrecisionConfig = PrecisionConfig()
    execution: ExecutionConfig = ExecutionConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("letters, digits, '.', '_' and '-' (it names the run directory)")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        names = [branch.name for branch in self.branches]
        if len(set(names)) < len(names):
            raise ValueError(f"branches: names must differ, given {', '.join(names)}")
        if self.views.global_crops.count < 2:
            raise ValueError("views.global_crops.count: the method needs at least 2 global views")
        self.objective.check_run(self)
        return self

    @property
    def lr_scale(self) -> float:
        """Factor on every peak learning rate: the linear scaling rule with base batch 256."""
        return self.optim.global_batch / 256.0

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps after which the run is done."""
        steps = self.optim.epochs * steps_per_epoch
        return min(steps, self.optim.max_steps or steps)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with its paths as this working directory means them; a later call may come from another."""
    evaluation, transfer = config.evaluation, config.evaluation.transfer
    branches = [
        branch.model_copy(update={"init": branch.init.absolute()}) if branch.init else branch
        for branch in config.branches
    ]
    logging = config.logging
    if logging.prometheus is not None:
        logging = logging.model_copy(update={"prometheus": logging.prometheus.absolute()})
    return config.model_copy(
        update={
            "logging": logging,
            "data": config.data.model_copy(update={"train": config.data.train.absolute()}),
            "evaluation": evaluation.model_copy(
                update={**_absolute(evaluation), "transfer": transfer.model_copy(update=_absolute(transfer))}
            ),
            "branches": tuple(branches),
        }
    )


def _absolute(section: EvaluationConfig | TransferConfig) -> dict[str, Path]:
    return {key: value.absolute() for key in ("train", "test") if (value := getattr(section, key)) is not None}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration at `path` with `key=value` overrides; UserError in one line when it cannot work."""
    return schema.load(RunConfig, path, overrides)
