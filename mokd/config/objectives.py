"""Objectives: what the branches learn from, and what that asks of the rest of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    StrictModel,
)
from mokd.config.ramps import RampConfig, check_ramp

if TYPE_CHECKING:
    from mokd.config.run import RunConfig


class THeadConfig(StrictModel):
    """The T-Head, the same for every branch since one branch's query enters another's."""

    width: Annotated[PositiveInt, Field(description="of its tokens")] = 384
    depth: Annotated[PositiveInt, Field(description="transformer blocks")] = 3
    heads: Annotated[PositiveInt, Field(description="attention heads; divide the width")] = 6
    mlp_ratio: Annotated[PositiveFloat, Field(description="hidden width of its MLPs over its width")] = 4.0
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

    self_mlp: Annotated[bool, Field(description="self-distillation, MLP head")] = True
    self_thead: Annotated[bool, Field(description="self-distillation, T-Head")] = True
    cross_mlp: Annotated[bool, Field(description="cross-distillation, MLP head")] = True
    cross_search: Annotated[
        bool, Field(description="cross-distillation, what local views find in the other branch's map")
    ] = True


class TermRampsConfig(StrictModel):
    """When each of the four loss terms begins, or ceases, to count; default: always, as the method has it."""

    self_mlp: RampConfig | None = None
    self_thead: RampConfig | None = None
    cross_mlp: RampConfig | None = None
    cross_search: RampConfig | None = None


class ObjectiveConfig(StrictModel):
    """What the sections of all objectives have in common: each knows what it asks of the rest of a run."""

    def check_run(self, run: RunConfig) -> None:
        """ValueError when another section of the configuration does not suit this objective."""

    def check_samples(self, samples: int) -> None:
        """UserError when so many training images do not suit this objective."""


class DinoConfig(ObjectiveConfig):
    """The four distillation terms over prototypes (method of the paper)."""

    kind: Annotated[Literal["dino"], Field(description="self- and cross-distillation over prototypes")] = "dino"
    prototypes: Annotated[PositiveInt, Field(description="K, of every head")] = 65536
    prototype_scale: Annotated[
        PositiveFloat,
        Field(description="first length of their directions over the method's; below 1: each step turns them further"),
    ] = 1.0
    t_head: THeadConfig = THeadConfig()
    terms: TermsConfig = TermsConfig()
    ramps: TermRampsConfig = TermRampsConfig()
    student_temp: Annotated[PositiveFloat, Field(description="temperature of the students")] = 0.1
    teacher_temp: Annotated[
        tuple[PositiveFloat, PositiveFloat], Field(description="of the teachers, [first, last] of the warm-up")
    ] = (0.04, 0.07)
    cross_temp_warmup_epochs: Annotated[
        NonNegativeInt, Field(description="of the temperature of targets from another branch")
    ] = 30
    cross_same_view: Annotated[
        bool, Field(description="cross-distillation, MLP head: also between the same view of both branches (ablation)")
    ] = False
    center_momentum: Annotated[Probability, Field(description="of the moving average that targets are centred by")] = (
        0.9
    )
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
        if any(branch.frozen for branch in run.branches) and not (on.cross_mlp or on.cross_search):
            raise ValueError("objective.terms: both cross terms are off, but only they learn from a frozen branch")
        if on.cross_search and not alone and not run.views.local_crops.count:
            raise ValueError("objective.terms.cross_search: needs views.local_crops.count > 0, or turn it off")
        for term, ramp in self.ramps:
            check_ramp(f"objective.ramps.{term}", ramp, run.optim.epochs)


class ProjectionConfig(StrictModel):
    """Linear layers with GELU between, over the pooled feature and over every position of the dense ones."""

    layers: Annotated[PositiveInt, Field(description="linear layers")] = 2
    hidden: Annotated[PositiveInt, Field(description="width between them")] = 2048


class BankConfig(StrictModel):
    """The memory bank of a branch: the newest keys of its teacher, negatives for the queries."""

    size: Annotated[PositiveInt, Field(description="keys that are kept")] = 65536
    storage: Annotated[Literal["fp32", "bf16"], Field(description="precision of the keys")] = "fp32"


class ContrastiveConfig(ObjectiveConfig):
    """InfoNCE against memory banks; cross-distillation by feature extraction, matching and alignment."""

    kind: Annotated[Literal["contrastive"], Field(description="InfoNCE against memory banks")] = "contrastive"
    width: Annotated[PositiveInt, Field(description="D, of queries and keys")] = 128
    projection: ProjectionConfig = ProjectionConfig()
    bank: BankConfig = BankConfig()
    temperature: Annotated[PositiveFloat, Field(description="of the similarities")] = 0.07
    cross_weight: Annotated[NonNegativeFloat, Field(description="beta; 0 leaves the cross terms out")] = 0.01
    residual_weight: Annotated[NonNegativeFloat, Field(description="lambda, of the other teacher's projection")] = 0.5

    def check_run(self, run: RunConfig) -> None:
        """ValueError unless there are two views of one size, the bank takes the keys of a step, and no branch is given
        what only the other objective reads.
        """
        _refuse_prototypes(run, "its heads are objective.projection, its temperature objective.temperature")
        if any(branch.frozen for branch in run.branches) and not self.cross_weight:
            raise ValueError("objective.cross_weight: is 0, but only cross terms learn from a frozen branch")
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


class DistillationConfig(ObjectiveConfig):
    """What imitates frozen branches alone: a projector of the student's pooled feature into each one's features."""

    projector: ProjectionConfig = ProjectionConfig()

    def check_run(self, run: RunConfig) -> None:
        """ValueError unless a branch is frozen and both networks see the same views."""
        _refuse_prototypes(run, "it has objective.projector")
        if not any(branch.frozen for branch in run.branches):
            raise ValueError(f"objective {run.objective.kind}: learns from frozen branches; set frozen and init of one")
        if run.views.local_crops.count:
            raise ValueError(f"objective {run.objective.kind}: has no local views; set views.local_crops.count to 0")


class SeedConfig(DistillationConfig):
    """SEED: similarities with a queue of the frozen branch's features, as that branch sees them (arXiv 2101.04731)."""

    kind: Annotated[Literal["seed"], Field(description="similarities with a queue, towards frozen branches")] = "seed"
    queue: BankConfig = BankConfig()
    student_temp: Annotated[PositiveFloat, Field(description="of the student's similarities")] = 0.2
    teacher_temp: Annotated[PositiveFloat, Field(description="of the frozen network's similarities")] = 0.01

    def check_run(self, run: RunConfig) -> None:
        """As every distillation; ValueError also for a queue that a step's features overflow."""
        super().check_run(run)
        keys = run.views.global_crops.count * run.optim.global_batch
        if self.queue.size < keys:
            raise ValueError(f"objective.queue.size: {self.queue.size}, but a step brings {keys} features")


class RegressionConfig(DistillationConfig):
    """Mean squared error between the projected feature and the frozen branch's, which is standardised."""

    kind: Annotated[Literal["regression"], Field(description="regression of frozen branches' features")] = "regression"


def _refuse_prototypes(run: RunConfig, instead: str) -> None:
    """ValueError where a branch has keys that only the objective over prototypes reads."""
    for branch in run.branches:
        for key in ("mlp_head", "t_head_group", "teacher_temp_warmup_epochs"):
            # a resolved configuration has every default written out: those mean nothing
            if getattr(branch, key) != type(branch).model_fields[key].default:
                raise ValueError(
                    f"branches.{branch.name}.{key}: objective {run.objective.kind} has no such part; remove it "
                    f"({instead})"
                )


AnyObjectiveConfig = Annotated[
    DinoConfig | ContrastiveConfig | SeedConfig | RegressionConfig, Field(discriminator="kind")
]
