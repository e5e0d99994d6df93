"""A branch, ready for training on this rank: networks, parallelism from outside, optimizer. The order matters."""

from __future__ import annotations

from typing import Any

import torch

from mokd.config import BranchConfig, RunConfig
from mokd.models.linear import is_faster, use_onednn
from mokd.objectives.base import Objective, build_pair
from mokd.objectives.branch import Branch, TeachingBranch, freeze
from mokd.optim.loss_scale import LossScale
from mokd.optim.optimizer import BranchOptimizer
from mokd.optim.precision import half_dtype
from mokd.parallel.activation_checkpointing import recompute_blocks
from mokd.parallel.compile import compile_networks
from mokd.parallel.parallelize import parallelize, parallelize_frozen
from mokd.runs.seeds import derive_seed


def is_recorded(config: RunConfig, device: torch.device) -> bool:
    """Whether the networks' passes are replayed as CUDA graphs."""
    return config.execution.cuda_graphs and device.type == "cuda"


def build_branch(
    config: RunConfig,
    branch: BranchConfig,
    objective: Objective[Any],
    device: torch.device,
    *,
    images_per_rank: int,
    epoch_steps: int,
) -> TeachingBranch:
    """The branch `branch` of a run, a `Branch` unless it is frozen; its first weights are a function of the run's seed
    and its name, until others are put in (`mokd.weights.initial`).
    """
    # seeded by name: a branch starts from the same weights in a pair and alone
    torch.manual_seed(derive_seed(config.seed, "initial weights", branch.name))
    by_block = config.parallel.strategy == "fsdp"
    by_onednn = device.type == "cpu" and is_faster()
    # FSDP casts what it gathers, and a compiler fuses its casts
    lends = half_dtype(config.precision) is not None and not by_block and not config.execution.compile
    if branch.frozen:
        teacher = freeze(objective.build_network(branch, images_per_rank, student=False))
        if by_onednn:
            use_onednn(teacher)
        if config.execution.compile:
            compile_networks([teacher], by_block=by_block)
        whole_backbone = parallelize_frozen(teacher, config.parallel, config.precision, device)
        if lends:
            teacher.lend_weights()
        return TeachingBranch(branch, teacher, whole_backbone)
    pair = build_pair(objective, branch, images_per_rank)
    if by_onednn:
        use_onednn(pair.student, pair.teacher)
    # innermost, so that everything below acts on the blocks from outside
    if branch.activation_checkpointing:
        recompute_blocks(pair.student.backbone, f"branches.{branch.name}")
    if config.execution.compile:
        compile_networks([pair.student, pair.teacher], by_block=by_block)
    accumulate = config.optim.accumulate > 1
    options = {"accumulate": accumulate, "recorded": is_recorded(config, device)}
    calls = parallelize(pair, config.parallel, config.precision, device, **options)
    if lends:
        pair.teacher.lend_weights()
        if not branch.activation_checkpointing:  # which computes again when the weights are back in their places
            pair.student.lend_weights()
    # after parallelism, which moves parameters to the device and may cut them into pieces
    optimizer = BranchOptimizer(pair.student, branch, config.optim, config.lr_scale, epoch_steps)
    return Branch(branch, pair, calls, optimizer, LossScale() if config.precision.compute == "fp16" else None)
