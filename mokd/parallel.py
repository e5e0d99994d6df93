"""Parallelism, applied to a branch from outside, in one place."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mokd.branch import Branch
from mokd.config import ParallelConfig
from mokd.sync_batchnorm import synchronise_batchnorm

# torch 2.15 has renamed the option
_BUFFER_OPTION = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


def parallelise(branch: Branch, config: ParallelConfig, device: torch.device) -> None:
    """Prepares a branch for this rank: device, synchronised BatchNorm, gradient averaging. The order matters."""
    # 1. the device, before anything takes references to parameters
    branch.student.to(device)
    branch.teacher.to(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # 2. BatchNorm over the global batch, in the teacher too: it runs in training mode
    synchronise_batchnorm(branch.student, device)
    synchronise_batchnorm(branch.teacher, device)
    # 3. gradients averaged over ranks; SyncBN keeps the buffers equal, so they need no broadcast
    on_gpu = device.type == "cuda"
    buffers: dict[str, Any] = {_BUFFER_OPTION: False}
    branch.forward_student = DistributedDataParallel(
        branch.student,
        device_ids=[device] if on_gpu else None,
        **buffers,
        gradient_as_bucket_view=True,
        static_graph=on_gpu,
        # On CPUs: without it DDP regroups its buckets after the first step, which changes the order of summation. A
        # resumed run, whose first step is another one, would no longer be bit-identical.
        find_unused_parameters=not on_gpu,
    )
