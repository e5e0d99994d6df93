"""The configuration of a run: every section but the launcher's own, with the paper's values as defaults."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline import schema
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.errors import UserError
from data_pipeline.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, StrictModel
from mokd.evaluation.config import EvaluationConfig


class GroupConfig(StrictModel):
    """Schedule of a group of parameters. `lr` is the peak rate for a global batch of 256; it scales with the batch."""

    lr: NonNegativeFloat
    min_lr: Annotated[NonNegativeFloat, Field(description="final rate, not scaled by the batch")] = 0.0
    weight_decay: Annotated[
        NonNegativeFloat | tuple[NonNegativeFloat, NonNegativeFloat],
        Field(description="constant, or [first, last] of a cosine"),
    ] = 0.0
    decay_all: Annotated[bool, Field(description="decay biases and 1-d parameters too")] = False

    @property
    def decay_range(self) -> tuple[float, float]:
        """First and last weight decay."""
        decay = self.weight_decay
        return decay if isinstance(decay, tuple) else (decay, decay)


class OptimizerConfig(GroupConfig):
    """A branch's optimiser and the schedule of every parameter that has no group of its own."""

    kind: Literal["sgd", "adamw"]
    momentum: Annotated[float, Field(ge=0.0, lt=1.0, description="sgd")] = 0.9
    betas: Annotated[tuple[float, float], Field(description="adamw")] = (0.9, 0.999)


class MlpHeadConfig(StrictModel):
    """Linear layers with GELU between, then L2 normalisation and the prototypes."""

    layers: PositiveInt = 3
    hidden: PositiveInt = 2048
    bottleneck: PositiveInt = 256
    batch_norm: bool = False
    train_gain: Annotated[bool, Field(description="train the gain of the prototypes' weight norm")] = True


class BranchConfig(StrictModel):
    """One network under training: a student and its teacher."""

    name: str
    backbone: Annotated[str, Field(description="a timm model name")]
    backbone_options: dict[str, Any] = {}
    stem: Annotated[
        Literal["default", "cifar", "cifar_stride2"],
        Field(description="ResNets on small images: one 3x3 convolution, no pooling; stride 1 or 2"),
    ] = "default"
    init: Annotated[Path | None, Field(description="backbone weights to start from (safetensors or state dict)")] = None
    weight: Annotated[float, Field(ge=0.0, description="lambda, the weight of the cross terms")] = 1.0
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    mlp_head: MlpHeadConfig = MlpHeadConfig()
    optimizer: OptimizerConfig
    t_head_group: GroupConfig | None = None
    teacher_temp_warmup_epochs: NonNegativeInt = 30
    activation_checkpointing: Annotated[
        bool,
        Field(description="keep only the inputs of the backbone's blocks, compute the rest again: memory for time"),
    ] = False

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ValueError("a letter, then letters, digits, '_' or '-'")
        return name


class THeadConfig(StrictModel):
    """The T-Head, the same for every branch since one branch's query enters another's."""

    width: PositiveInt = 384
    depth: PositiveInt = 3
    heads: PositiveInt = 6
    mlp_ratio: PositiveFloat = 4.0
    gain: Annotated[
        PositiveFloat, Field(description="first gain of the prototypes' weight norm; smaller: softer targets at first")
    ] = 1.0

    @model_validator(mode="after")
    def _divisible(self) -> THeadConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        return self


class TermsConfig(StrictModel):
    """Which of the four loss terms take part (ablations)."""

    self_mlp: bool = True
    self_thead: bool = True
    cross_mlp: bool = True
    cross_search: bool = True


class ObjectiveConfig(StrictModel):
    """What the sections of all objectives have in common: each knows what it asks of the rest of a run."""

    def check_run(self, run: RunConfig) -> None:
        """ValueError when another section of the configuration does not suit this objective."""

    def check_samples(self, samples: int) -> None:
        """UserError when so many training images do not suit this objective."""


class DinoConfig(ObjectiveConfig):
    """The four distillation terms over prototypes (method of the paper)."""

    kind: Literal["dino"] = "dino"
    prototypes: PositiveInt = 65536
    t_head: THeadConfig = THeadConfig()
    terms: TermsConfig = TermsConfig()
    student_temp: PositiveFloat = 0.1
    teacher_temp: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    cross_temp_warmup_epochs: NonNegativeInt = 30
    center_momentum: Probability = 0.9
    center_search: Annotated[
        bool, Field(description="ablation: also what the search finds is centred, by the other T-Head's centre")
    ] = False

    @model_validator(mode="after")
    def _workable(self) -> DinoConfig:
        if self.prototypes < 2:
            raise ValueError("prototypes: at least 2, or every softmax is constant")
        return self

    def check_run(self, run: RunConfig) -> None:
        """ValueError when no term is left, or the search has no local views to search for."""
        on, alone = self.terms, len(run.branches) == 1
        if not (on.self_mlp or on.self_thead) and (alone or not (on.cross_mlp or on.cross_search)):
            what = "a branch alone has the self terms only, and both are off" if alone else "all four are off"
            raise ValueError(f"objective.terms: {what}; nothing is left to learn from")
        if on.cross_search and not alone and not run.views.local_crops.count:
            raise ValueError("objective.terms.cross_search: needs views.local_crops.count > 0, or turn it off")


class ProjectionConfig(StrictModel):
    """Linear layers with GELU between, over the pooled feature and over every position of the dense ones."""

    layers: PositiveInt = 2
    hidden: PositiveInt = 2048


class BankConfig(StrictModel):
    """The memory bank of a branch: the newest keys of its teacher, negatives for the queries."""

    size: PositiveInt = 65536
    storage: Literal["fp32", "bf16"] = "fp32"


class ContrastiveConfig(ObjectiveConfig):
    """InfoNCE against memory banks; cross-distillation by feature extraction, matching and alignment."""

    kind: Literal["contrastive"] = "contrastive"
    width: Annotated[PositiveInt, Field(description="D, of queries and keys")] = 128
    projection: ProjectionConfig = ProjectionConfig()
    bank: BankConfig = BankConfig()
    temperature: PositiveFloat = 0.07
    cross_weight: Annotated[NonNegativeFloat, Field(description="beta; 0 leaves the cross terms out")] = 0.01
    residual_weight: Annotated[NonNegativeFloat, Field(description="lambda, of the other teacher's projection")] = 0.5

    def check_run(self, run: RunConfig) -> None:
        """ValueError unless there are two views of one size and the bank takes the keys of a step."""
        if (run.views.global_crops.count, run.views.local_crops.count) != (2, 0):
            raise ValueError(
                "objective contrastive: has two views of an image; "
                "set views.global_crops.count to 2 and views.local_crops.count to 0"
            )
        keys = 2 * run.optim.global_batch
        if self.bank.size < keys:
            raise ValueError(
                f"objective.bank.size: {self.bank.size}, but a step brings {keys} keys, "
                "two for every image of optim.global_batch"
            )

    def check_samples(self, samples: int) -> None:
        """UserError when the bank would hold the former keys of the very images that a query is compared with."""
        if self.bank.size > 2 * samples:
            raise UserError(
                f"objective.bank.size: {self.bank.size}, but {samples} images bring {2 * samples} keys an epoch, so "
                f"that every image would meet its own as negatives; use at most {2 * samples}, better a tenth of it"
            )


AnyObjectiveConfig = Annotated[DinoConfig | ContrastiveConfig, Field(discriminator="kind")]


class OptimConfig(StrictModel):
    """Length, batch and schedules of the optimisation."""

    epochs: PositiveInt = 100
    global_batch: Annotated[PositiveInt, Field(description="images per step over all ranks")] = 256
    accumulate: Annotated[
        PositiveInt, Field(description="micro-batches per step: each rank's images are dealt into so many parts")
    ] = 1
    warmup_epochs: NonNegativeFloat = 10.0
    max_steps: Annotated[PositiveInt | None, Field(description="stop early; the schedules still span the epochs")] = (
        None
    )
    clip_grad_norm: Annotated[PositiveFloat | None, Field(description="per parameter; null turns it off")] = 3.0
    freeze_last_layer_epochs: NonNegativeInt = 1
    teacher_momentum: tuple[Probability, Probability] = (0.996, 1.0)


class PrecisionConfig(StrictModel):
    """Arithmetic of the networks; losses, centres and norms are always fp32 or better."""

    compute: Annotated[
        Literal["fp32", "bf16", "fp16"], Field(description="fp16 scales every branch's loss by itself")
    ] = "fp32"
    tf32: Annotated[bool, Field(description="GPUs: fp32 products in TensorFloat-32")] = True
    channels_last: Annotated[bool, Field(description="convolutional backbones in NHWC memory order")] = True


class ParallelConfig(StrictModel):
    """How the ranks share the work."""

    strategy: Annotated[
        Literal["ddp", "fsdp"],
        Field(description="ddp: all state on every rank; fsdp: weights and states split over ranks"),
    ] = "ddp"
    shard_group_size: Annotated[
        PositiveInt | None, Field(description="fsdp: ranks that hold one copy together; default: all ranks")
    ] = None
    reshard_after_forward: Annotated[
        bool, Field(description="fsdp: free a block's gathered weights after its forward pass")
    ] = True
    timeout_seconds: Annotated[PositiveFloat, Field(description="a collective older than this ends the run")] = 600.0
    threads_per_rank: Annotated[PositiveInt | None, Field(description="torch threads; default: cores per rank")] = None


class ExecutionConfig(StrictModel):
    """How the step is computed: what changes its speed and memory, not its mathematics."""

    compile: Annotated[bool, Field(description="torch.compile of every network; the first steps take minutes")] = False
    cuda_graphs: Annotated[bool, Field(description="with compile, on GPUs: networks are replayed as CUDA graphs")] = (
        False
    )
    overlap_teachers: Annotated[
        bool, Field(description="GPUs: the teachers run beside the first student, on a stream of their own")
    ] = False
    recompute_logits: Annotated[
        bool | None, Field(description="compute logits twice instead of keeping them; default: on GPUs")
    ] = None

    @model_validator(mode="after")
    def _workable(self) -> ExecutionConfig:
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs: are made of compiled networks; set execution.compile to true")
        return self


class CheckpointConfig(StrictModel):
    """When state is saved and what is kept."""

    every_steps: Annotated[PositiveInt | None, Field(description="default: once an epoch")] = None
    asynchronous: Annotated[bool, Field(description="train on while a thread writes; costs a copy in host memory")] = (
        True
    )
    keep_last: PositiveInt = 2
    keep_every_steps: Annotated[PositiveInt | None, Field(description="never prune steps divisible by this")] = None


class LoggingConfig(StrictModel):
    """What is written while training."""

    every_steps: PositiveInt = 10
    tensorboard: bool = True


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


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration at `path` with `key=value` overrides; UserError in one line when it cannot work."""
    return schema.load(RunConfig, path, overrides)
