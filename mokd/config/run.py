"""A whole run: every section but the launcher's own, with the paper's values as defaults."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator, model_validator

from data_pipeline.config import DataConfig, ViewsConfig, check_channels
from data_pipeline.core import schema
from data_pipeline.core.schema import NonNegativeInt, StrictModel
from mokd.config.branches import BranchConfig
from mokd.config.evaluation import EvaluationConfig
from mokd.config.execution import CheckpointConfig, ExecutionConfig, OptimConfig, ParallelConfig, PrecisionConfig
from mokd.config.logging import LoggingConfig
from mokd.config.objectives import AnyObjectiveConfig, DinoConfig
from mokd.config.paths import absolute_path
from mokd.config.ramps import check_ramp
from mokd.config.weights import absolute_init


class RunConfig(StrictModel):
    """A whole run. `cluster` is the launcher's: it is carried along here and validated there."""

    name: Annotated[str, Field(description="of the run and of its directory")]
    seed: Annotated[NonNegativeInt, Field(description="of everything that is drawn")] = 0
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
    cluster: Annotated[dict[str, Any], Field(description="see below")] = {}

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
        if all(branch.frozen for branch in self.branches):
            raise ValueError("branches: all of them are frozen; nothing would learn")
        if self.views.global_crops.count < 2:
            raise ValueError("views.global_crops.count: the method needs at least 2 global views")
        for branch in self.branches:
            check_ramp(f"branches.{branch.name}.weight_ramp", branch.weight_ramp, self.optim.epochs)
        check_channels(self.data, self.views)
        self.objective.check_run(self)
        self.execution.check_run(self)
        return self

    @property
    def lr_scale(self) -> float:
        """Factor on every peak learning rate: the linear scaling rule with base batch 256."""
        return self.optim.global_batch / 256.0

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps after which the run is done."""
        steps = self.optim.epochs * steps_per_epoch
        return min(steps, self.optim.max_steps or steps)


def with_absolute_paths(config: RunConfig, before: RunConfig | None = None) -> RunConfig:
    """The configuration with its paths as this working directory means them; a later call may come from another.

    before: the same run's, absolute: a path that it ends in means what it meant then, wherever this call comes from.
    """
    changed: RunConfig = _absolute(config, before)
    inits = {branch.name: branch.init for branch in before.branches} if before else {}
    branches = [
        branch.model_copy(update={"init": branch.init and absolute_init(branch.init, inits.get(branch.name))})
        for branch in changed.branches
    ]
    return changed.model_copy(update={"branches": tuple(branches)})


def _absolute(value: Any, before: Any) -> Any:
    if isinstance(value, Path):
        return absolute_path(value, before if isinstance(before, Path) else None)
    if isinstance(value, BaseModel):
        found = {key: _absolute(part, getattr(before, key, None)) for key, part in value if part is not None}
        return value.model_copy(update={key: part for key, part in found.items() if part is not getattr(value, key)})
    return value


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration at `path` with `key=value` overrides; UserError in one line when it cannot work."""
    return schema.load(RunConfig, path, overrides)
