"""How a run is optimised, computed, shared among ranks, saved and logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from data_pipeline.core.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    StrictModel,
)

if TYPE_CHECKING:
    from mokd.config.run import RunConfig


class OptimConfig(StrictModel):
    """Length, batch and schedules of the optimisation."""

    epochs: Annotated[PositiveInt, Field(description="passes over the images; schedules span them")] = 100
    global_batch: Annotated[PositiveInt, Field(description="images per step over all ranks")] = 256
    accumulate: Annotated[
        PositiveInt, Field(description="micro-batches per step: each rank's images are dealt into so many parts")
    ] = 1
    warmup_epochs: Annotated[NonNegativeFloat, Field(description="of the learning rate, linear")] = 10.0
    max_steps: Annotated[PositiveInt | None, Field(description="stop early; the schedules still span the epochs")] = (
        None
    )
    clip_grad_norm: Annotated[PositiveFloat | None, Field(description="per parameter; null turns it off")] = 3.0
    freeze_last_layer_epochs: Annotated[NonNegativeInt, Field(description="in which the prototypes stand still")] = 1
    teacher_momentum: Annotated[
        tuple[Probability, Probability], Field(description="of the teacher's average, [first, last] of a cosine")
    ] = (0.996, 1.0)


class PrecisionConfig(StrictModel):
    """Arithmetic of the networks; losses, centres and norms are always fp32 or better."""

    compute: Annotated[
        Literal["fp32", "bf16", "fp16"], Field(description="fp16 scales every branch's loss by itself")
    ] = "fp32"
    tf32: Annotated[bool, Field(description="GPUs: fp32 products in TensorFloat-32")] = True
    deterministic: Annotated[
        bool, Field(description="GPUs: only algorithms that give the same bits every time; slower, see docs/gpu.md")
    ] = False
    channels_last: Annotated[bool, Field(description="convolutional backbones in NHWC memory order")] = True


class ParallelConfig(StrictModel):
    """How the ranks share the work."""

    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Field(description="auto: GPUs where there are any; under SLURM CPUs are used only when cpu is said"),
    ] = "auto"
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
    startup_timeout_seconds: Annotated[
        PositiveFloat, Field(description="a collective older than this ends the attempt, until the first step is done")
    ] = 1800.0
    timeout_seconds: Annotated[PositiveFloat, Field(description="the same after the first step")] = 600.0
    threads_per_rank: Annotated[PositiveInt | None, Field(description="torch threads; default: cores per rank")] = None


class ExecutionConfig(StrictModel):
    """How the step is computed: what changes its speed and memory, not its mathematics."""

    compile: Annotated[bool, Field(description="torch.compile of every network; the first steps take minutes")] = False
    cuda_graphs: Annotated[
        bool, Field(description="GPUs: record the networks' passes once and replay them; fast with few images a GPU")
    ] = False
    overlap_teachers: Annotated[
        bool, Field(description="GPUs: the teachers run beside the first student, on a stream of their own")
    ] = False
    recompute_logits: Annotated[
        bool | None, Field(description="compute logits twice instead of keeping them; default: on GPUs")
    ] = None

    def check_run(self, run: RunConfig) -> None:
        """ValueError when CUDA graphs are asked for of a step that cannot be recorded."""
        refused = {
            "execution.overlap_teachers": self.overlap_teachers,  # graphs share memory, and so run one after another
            "objective other than dino": run.objective.kind != "dino",
            "parallel.strategy: fsdp": run.parallel.strategy == "fsdp",
            "precision.compute: fp16": run.precision.compute == "fp16",  # its scale is a number that changes
            "optim.accumulate": run.optim.accumulate > 1,
            "activation_checkpointing": any(branch.activation_checkpointing for branch in run.branches),
        }
        if self.cuda_graphs and (found := [name for name, given in refused.items() if given]):
            raise ValueError(f"execution.cuda_graphs: a step with {', '.join(found)} cannot be recorded; turn one off")


class CheckpointConfig(StrictModel):
    """When state is saved and what is kept."""

    every_steps: Annotated[PositiveInt | None, Field(description="default: once an epoch")] = None
    asynchronous: Annotated[bool, Field(description="train on while a thread writes; costs a copy in host memory")] = (
        True
    )
    keep_last: Annotated[PositiveInt, Field(description="newest checkpoints that are kept")] = 2
    keep_every_steps: Annotated[PositiveInt | None, Field(description="never prune steps divisible by this")] = None
