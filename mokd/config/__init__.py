"""The configuration of a run, a module for each part of it; importing it imports no torch."""

from mokd.config.branches import BranchConfig, GroupConfig, MlpHeadConfig, OptimizerConfig
from mokd.config.evaluation import (
    EvaluationConfig,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    RatesConfig,
    SemiConfig,
    TransferConfig,
)
from mokd.config.execution import (
    CheckpointConfig,
    ExecutionConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
)
from mokd.config.logging import AlarmsConfig, LoggingConfig
from mokd.config.objectives import (
    AnyObjectiveConfig,
    BankConfig,
    ContrastiveConfig,
    CrossGateConfig,
    DinoConfig,
    DistillationConfig,
    ObjectiveConfig,
    ProjectionConfig,
    RegressionConfig,
    SeedConfig,
    TermsConfig,
    THeadConfig,
)
from mokd.config.run import RunConfig, load_config, with_absolute_paths
from mokd.config.weights import InitSource, parse_init

__all__ = [
    "AlarmsConfig",
    "AnyObjectiveConfig",
    "BankConfig",
    "BranchConfig",
    "CheckpointConfig",
    "ContrastiveConfig",
    "CrossGateConfig",
    "DinoConfig",
    "DistillationConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "FinetuneConfig",
    "GroupConfig",
    "InitSource",
    "KnnConfig",
    "LinearConfig",
    "LoggingConfig",
    "MlpHeadConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProjectionConfig",
    "RatesConfig",
    "RegressionConfig",
    "RunConfig",
    "SeedConfig",
    "SemiConfig",
    "THeadConfig",
    "TermsConfig",
    "TransferConfig",
    "load_config",
    "parse_init",
    "with_absolute_paths",
]
