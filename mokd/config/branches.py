"""Branches and their optimisers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.core.schema import NonNegativeFloat, NonNegativeInt, PositiveInt, StrictModel
from mokd.config.ramps import RampConfig
from mokd.config.weights import parse_init


class GroupConfig(StrictModel):
    """Schedule of a group of parameters. `lr` is the peak rate for a global batch of 256; it scales with the batch."""

    lr: Annotated[NonNegativeFloat, Field(description="peak rate for a batch of 256; scaled by the batch")]
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

    kind: Annotated[Literal["sgd", "adamw"], Field(description="sgd or adamw")]
    momentum: Annotated[float, Field(ge=0.0, lt=1.0, description="sgd")] = 0.9
    betas: Annotated[tuple[float, float], Field(description="adamw")] = (0.9, 0.999)
    backbone_lr_factor: Annotated[
        NonNegativeFloat, Field(description="on the rates of the backbone; below 1 for one that starts from init")
    ] = 1.0
    layer_decay: Annotated[
        float, Field(gt=0.0, le=1.0, description="factor on the rates of the backbone per layer below the heads")
    ] = 1.0


class MlpHeadConfig(StrictModel):
    """Linear layers with GELU between, then L2 normalisation and the prototypes."""

    layers: Annotated[PositiveInt, Field(description="linear layers")] = 3
    hidden: Annotated[PositiveInt, Field(description="width between them")] = 2048
    bottleneck: Annotated[PositiveInt, Field(description="width ahead of the prototypes")] = 256
    batch_norm: Annotated[bool, Field(description="BatchNorm after every layer but the last")] = False
    train_gain: Annotated[bool, Field(description="train the gain of the prototypes' weight norm")] = True


class BranchConfig(StrictModel):
    """One network under training: a student and its teacher."""

    name: Annotated[str, Field(description="of the branch: in files, metrics and commands")]
    backbone: Annotated[str, Field(description="a timm model name")]
    backbone_options: Annotated[dict[str, Any], Field(description="arguments of timm's constructor")] = {}
    stem: Annotated[
        Literal["default", "cifar", "cifar_stride2"],
        Field(description="ResNets on small images: one 3x3 convolution, no pooling; stride 1 or 2"),
    ] = "default"
    init: Annotated[
        str | None,
        Field(
            description="backbone weights to start from: timm, hub:REPOSITORY, torchvision:WEIGHTS, run:RUN/BRANCH or "
            "a file; see docs/weights.md"
        ),
    ] = None
    freeze_backbone_epochs: Annotated[
        NonNegativeInt, Field(description="first epochs in which the heads alone learn")
    ] = 0
    frozen: Annotated[
        bool, Field(description="gives targets with the weights of init and learns nothing; see docs/method.md")
    ] = False
    weight: Annotated[float, Field(ge=0.0, description="lambda, the weight of the cross terms")] = 1.0
    weight_ramp: Annotated[RampConfig | None, Field(description="when lambda begins to count; default: at once")] = None
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0, description="stochastic depth of the student")] = 0.0
    mlp_head: MlpHeadConfig = MlpHeadConfig()
    optimizer: Annotated[OptimizerConfig | None, Field(description="a frozen branch has none")] = None
    t_head_group: Annotated[
        GroupConfig | None, Field(description="rates of the T-Head's parameters; default: the optimizer's")
    ] = None
    teacher_temp_warmup_epochs: Annotated[
        NonNegativeInt, Field(description="of the temperature of its own targets")
    ] = 30
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

    @field_validator("init")
    @classmethod
    def _known_source(cls, init: str | None) -> str | None:
        if init is not None:
            parse_init(init)
        return init

    @model_validator(mode="after")
    def _workable(self) -> BranchConfig:
        if self.frozen and self.init is None:
            raise ValueError("frozen: gives the targets of the weights that init names; set init")
        if not self.frozen and self.optimizer is None:
            raise ValueError("optimizer: missing; only a frozen branch has none")
        return self

    @property
    def own_optimizer(self) -> OptimizerConfig:
        """The optimiser's section of a branch that learns."""
        assert self.optimizer is not None, f"branches.{self.name} is frozen"
        return self.optimizer
