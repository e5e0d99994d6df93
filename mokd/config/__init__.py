"""The configuration of a run, a module for each part of it, and here what other rooms read; it imports no torch."""

from mokd.config.branches import BranchConfig, GroupConfig, MlpHeadConfig, OptimizerConfig
from mokd.config.execution import CheckpointConfig, OptimConfig, ParallelConfig, PrecisionConfig
from mokd.config.logging import LoggingConfig
from mokd.config.objectives import (
    ContrastiveConfig,
    DinoConfig,
    DistillationConfig,
    ProjectionConfig,
    RegressionConfig,
    SeedConfig,
    THeadConfig,
)
from mokd.config.run import RunConfig, load_config, with_absolute_paths
from mokd.config.weights import InitSource, parse_init

__all__ = [
    "BranchConfig",
    "CheckpointConfig",
    "ContrastiveConfig",
    "DinoConfig",
    "DistillationConfig",
    "GroupConfig",
    "InitSource",
    "LoggingConfig",
    "MlpHeadConfig",
    "OptimConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProjectionConfig",
    "RegressionConfig",
    "RunConfig",
    "SeedConfig",
    "THeadConfig",
    "load_config",
    "parse_init",
    "with_absolute_paths",
]
