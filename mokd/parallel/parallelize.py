"""Parallelism, applied to a branch from outside, in one place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from mokd.config import ParallelConfig, PrecisionConfig
from mokd.distributed.sharding import fill_whole
from mokd.losses.prototypes import Prototypes
from mokd.models.backbones import Backbone
from mokd.models.sync_batchnorm import synchronize_batchnorm
from mokd.models.trainable import TrainableNetwork
from mokd.objectives.branch import NetworkPair, ParallelCalls, single_process
from mokd.optim.precision import half_dtype

_DDP_OPTIONS = signature(DistributedDataParallel).parameters
# torch 2.15 has renamed the option
_BUFFER_OPTION = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _DDP_OPTIONS)


def parallelize(
    pair: NetworkPair,
    config: ParallelConfig,
    precision: PrecisionConfig,
    device: torch.device,
    *,
    accumulate: bool = False,
    recorded: bool = False,
) -> ParallelCalls:
    """Prepares networks, in place, for this rank: memory order, device, SyncBN, averaging of gradients.

    recorded: the passes are replayed as CUDA graphs, so gradients are averaged after them.
    """
    if precision.channels_last:
        for network in (pair.student, pair.teacher):
            _use_channels_last(network, weights_too=config.strategy == "ddp")
    if not dist.is_initialized():
        pair.student.to(device)
        pair.teacher.to(device)
        return single_process(pair)
    # BatchNorm over the global batch, in the teacher too: it runs in training mode. Its buffers stay whole and equal
    # on every rank, whatever the strategy
    synchronize_batchnorm(pair.student, device)
    synchronize_batchnorm(pair.teacher, device)
    if config.strategy == "fsdp":
        return _shard(pair, config, precision, device)
    return _replicate(pair, device, accumulate, precision.deterministic, recorded)


def parallelize_frozen(
    teacher: TrainableNetwork, config: ParallelConfig, precision: PrecisionConfig, device: torch.device
) -> Callable[[], Backbone]:
    """Prepares the network of a frozen branch, in place; returns what gives its backbone to evaluations.

    Ranks share nothing of it but, with FSDP, its memory: it has no gradients, and in evaluation mode its BatchNorm
    needs no statistics.
    """
    if precision.channels_last:
        _use_channels_last(teacher, weights_too=config.strategy == "ddp")
    if config.strategy == "fsdp" and dist.is_initialized():
        return _shard_teacher(teacher, shard_mesh(config, device), precision, device)
    teacher.to(device)
    return lambda: teacher.backbone


def _use_channels_last(network: TrainableNetwork, *, weights_too: bool) -> None:
    """Convolutional backbones in NHWC order, which is that of GPUs' tensor cores and of CPUs' vectors.

    FSDP cannot split such weights.
    """
    backbone = network.backbone
    backbone.channels_last = not backbone.is_sequence
    if backbone.channels_last and weights_too:
        backbone.to(memory_format=torch.channels_last)


def _replicate(
    pair: NetworkPair, device: torch.device, accumulate: bool, deterministic: bool, recorded: bool
) -> ParallelCalls:
    """DDP: everything on every rank, gradients averaged in buckets during the backward pass; `recorded`, after it."""
    # the device, before anything takes references to parameters
    pair.student.to(device)
    pair.teacher.to(device)
    if recorded:  # DDP's hooks would decide while the step is recorded what is done in every replay
        average = partial(average_gradients, list(pair.student.parameters()))
        return ParallelCalls(pair.student, lambda: pair.teacher.backbone, finish_gradients=average)
    on_gpu = device.type == "cuda"
    options = ddp_options(on_gpu=on_gpu, accumulate=accumulate, deterministic=deterministic)
    student = DistributedDataParallel(pair.student, device_ids=[device] if on_gpu else None, **options)
    return ParallelCalls(student, lambda: pair.teacher.backbone, accumulating=student.no_sync)


def ddp_options(*, on_gpu: bool, accumulate: bool, deterministic: bool = False) -> dict[str, Any]:
    """The flags of DDP on either kind of device."""
    same_bits = deterministic or not on_gpu
    return {
        # SyncBN keeps the buffers equal, so they need no broadcast
        _BUFFER_OPTION: False,
        # gradients are dropped after each step, so DDP copies the new ones into its buckets: together where torch can
        **({"batched_grad_copy": True} if on_gpu and "batched_grad_copy" in _DDP_OPTIONS else {}),
        # With a static graph this is no matter of memory alone. The first pass of a run has frozen prototypes, which
        # the graph then counts as unused for good: DDP would hand their gradients back as they were on this rank. As
        # views of buckets they are averaged all the same.
        "gradient_as_bucket_view": True,
        # a static graph is learnt from the first backward pass, which would be one without averaging
        "static_graph": not same_bits and not accumulate,
        # Without it DDP regroups its buckets after the first step, which changes the order of summation. A resumed
        # run, whose first step is another one, would no longer be bit-identical.
        "find_unused_parameters": same_bits,
    }


def _shard(
    pair: NetworkPair, config: ParallelConfig, precision: PrecisionConfig, device: torch.device
) -> ParallelCalls:
    """FSDP2: student and teacher sharded alike, so that the teacher's average needs no communication."""
    mesh = shard_mesh(config, device)
    # what the root gathers is needed at once when the backward pass begins; a teacher has none
    _shard_network(pair.student, mesh, precision, device, reshard=config.reshard_after_forward, root_reshard=False)
    whole_teacher_backbone = _shard_teacher(pair.teacher, mesh, precision, device)
    replicated = [p for p in pair.student.parameters() if p.ndim <= 1 and p.requires_grad]
    return ParallelCalls(
        pair.student,
        whole_teacher_backbone,
        accumulating=partial(_without_averaging, pair.student),
        finish_gradients=partial(average_gradients, replicated),
    )


def _shard_teacher(
    teacher: TrainableNetwork, mesh: DeviceMesh, precision: PrecisionConfig, device: torch.device
) -> Callable[[], Backbone]:
    """Shards a teacher in place; returns what puts its backbone together, on all ranks at once."""
    # evaluations run ranks at their own pace, which a sharded network cannot: they get the weights in one piece
    with torch.no_grad():
        skeleton = copy.deepcopy(teacher.backbone).to("meta")
    _shard_network(teacher, mesh, precision, device, reshard=True, root_reshard=True)
    # hooks of FSDP run on `forward` alone
    if hasattr(teacher, "search"):
        register_fsdp_forward_method(teacher, "search")
    return partial(_whole_backbone, skeleton, teacher.backbone, device)


def shard_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """All ranks in one group, or in groups of `shard_group_size` that hold copies of each other (hybrid sharding)."""
    world = dist.get_world_size()
    size = config.shard_group_size or world
    if size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def _shard_network(
    network: TrainableNetwork,
    mesh: DeviceMesh,
    precision: PrecisionConfig,
    device: torch.device,
    *,
    reshard: bool,
    root_reshard: bool,
) -> None:
    """Groups from the inside out: each unit of the network, then the rest as the root."""
    # a network's outputs are views of its head's rows; nobody changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # One-dimensional parameters (biases, normalisations, layer scales) stay whole and in fp32 on every rank: they are
    # small, and a normalisation with parameters in half precision would be another function than under DDP.
    whole = {p for p in network.parameters() if p.ndim <= 1}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    shard = partial(fully_shard, mesh=mesh, ignored_params=whole)
    # gathered as the arithmetic uses them, which halves the traffic; summed up in fp32
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    dtype = half_dtype(precision)
    compute = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype else exact
    units = network.units()
    for block in units.half:
        shard(block, mp_policy=compute, reshard_after_forward=reshard)
    for head in units.exact:
        if isinstance(head, Prototypes):
            head.lends_storage = False
        shard(head, mp_policy=exact, reshard_after_forward=reshard)
    shard(network, mp_policy=exact, reshard_after_forward=root_reshard)


def _whole_backbone(skeleton: Backbone, sharded: Backbone, device: torch.device) -> Backbone:
    backbone: Backbone = copy.deepcopy(skeleton).to_empty(device=device)
    fill_whole(backbone, sharded)
    return backbone


@contextmanager
def _without_averaging(student: nn.Module) -> Generator[None]:
    """Gradients add up on every rank; the next backward pass outside reduces the sum."""
    root = cast(FSDPModule, student)
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over all ranks of the gradients that whole parameters have, in one collective."""
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
