"""Five training steps in float64 on given images, in this rank; the first rank writes the state it ends in.

usage: python -m tests.programs.train_steps OUTPUT.safetensors OBJECTIVE [--FLAG ...] [key.path=value ...]

OBJECTIVE: dino, contrastive, or dino-frozen, contrastive-frozen, seed, regression with a frozen branch, whose weights
are random here.

--gpu-batchnorm: on CPU tensors, the synchronised BatchNorm that GPUs get. --own-casts: autocast casts every weight by
itself. --monitors: every step is measured, and what
the last one has shown is written too.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from data_pipeline.core import schema
from mokd.checkpointing import state
from mokd.config import RunConfig
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import barrier, join, leave, ranks_from_environment
from mokd.distributed.sharding import piece
from mokd.distributed.stopping import StopRequest
from mokd.models import sync_batchnorm
from mokd.models.trainable import TrainableNetwork
from mokd.monitoring.monitors import Monitors, OfRank
from mokd.objectives.base import build_objective
from mokd.objectives.branch import Branch, learning
from mokd.parallel.build import build_branch
from mokd.training.entry import leave_at_once
from mokd.training.feasibility import images_per_rank
from mokd.training.step import TrainingStep
from tests.support import CONTRASTIVE, REGRESSION, RESNET, SEED, THIRD, VIT, frozen, tiny

BATCH, STEPS = 12, 5
OBJECTIVES = {"contrastive": CONTRASTIVE, "seed": SEED, "regression": REGRESSION}
OVERFLOW = 2  # the step at which, in fp16, a gradient of the first branch overflows on the last rank


def overflow_once(branch: Branch) -> None:
    """Makes one element of the next gradient infinite, in this rank alone."""
    finish = branch.finish_gradients

    def finish_and_break() -> None:
        finish()
        largest = max((p for p in branch.student.parameters() if p.grad is not None), key=lambda p: p.numel())
        piece(largest.grad).view(-1)[0] = torch.inf
        branch.finish_gradients = finish

    branch.finish_gradients = finish_and_break


def main(output: str, objective_kind: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    if "--gpu-batchnorm" in overrides:
        sync_batchnorm.CpuSyncBatchNorm = sync_batchnorm.GpuSyncBatchNorm
        overrides = tuple(override for override in overrides if override != "--gpu-batchnorm")
    if "--own-casts" in overrides:
        TrainableNetwork.lend_weights = lambda network: None
    monitored = "--monitors" in overrides
    overrides = tuple(override for override in overrides if override not in ("--monitors", "--own-casts"))
    ranks = ranks_from_environment()
    device = pick_device(ranks)
    join(ranks, device, 240)
    resnet = {**RESNET, "mlp_head": {**RESNET["mlp_head"], "batch_norm": True}}
    raw = tiny(
        branches=[resnet, VIT if objective_kind in ("dino", "contrastive") else frozen(VIT), THIRD],
        optim__global_batch=BATCH,
        optim__freeze_last_layer_epochs=0,
        optim__warmup_epochs=0,
        **OBJECTIVES.get(objective_kind.removesuffix("-frozen"), {}),
        optim__clip_grad_norm=0.05,  # low enough to act
    )
    config = schema.validate(RunConfig, schema.apply_overrides(raw, overrides), "train_steps")
    # half precision is made from fp32 alone
    torch.set_default_dtype(torch.float64 if config.precision.compute == "fp32" else torch.float32)
    objective = build_objective(config, device)
    objective.load_state_tensors({key: t.to(torch.get_default_dtype()) for key, t in objective.state_tensors().items()})
    own = images_per_rank(config, ranks.world_size)
    branches = [
        build_branch(config, branch, objective, device, images_per_rank=own, epoch_steps=STEPS)
        for branch in config.branches
    ]
    for branch in learning(branches):
        if branch.loss_scale is not None:
            branch.loss_scale.scale = 1.0  # networks so small have large gradients
    monitors, shown = Monitors(config, ranks, device), None
    training = TrainingStep(config, branches, objective, StopRequest(), ranks, device, STEPS)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        groups = [(group.count, group.size_px) for group in config.views.groups]
        views = [torch.randn(v, BATCH, 3, s, s, generator=generator) for v, s in groups]
        mine = [view[:, ranks.rank * own : (ranks.rank + 1) * own] for view in views]
        if config.precision.compute == "fp16" and step == OVERFLOW and ranks.rank == ranks.world_size - 1:
            overflow_once(learning(branches)[0])
        done = training.run(step, mine, epoch=0, measure=monitored)
        if monitored:
            names = [branch.name for branch in learning(branches)]
            shown = monitors.collect(names, done.losses, done.updates, OfRank(0.0, 0.0))
    files = state.collect(branches, objective, main=ranks.is_main)
    evaluated = {branch.name: branch.whole_teacher_backbone().state_dict() for branch in branches}
    if ranks.is_main:
        for name, tensors in evaluated.items():
            for key, tensor in tensors.items():
                assert torch.equal(files[f"branch-{name}"][f"teacher.backbone.{key}"], tensor), key
        tensors = {f"{name}/{key}": tensor for name, file in files.items() for key, tensor in file.items()}
        if shown is not None:
            values = {
                key: torch.tensor(v, dtype=torch.float64) for key, v in shown.measured().values.items() if "/" in key
            }
            tensors |= {f"monitors/{key}": value for key, value in values.items()}
        save_file(tensors, output)
    barrier()  # nobody closes its connections while another still needs them
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_at_once(0)
