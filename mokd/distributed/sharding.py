"""Tensors of which this rank holds only some rows: its piece, where that lies in the whole, and the way there and back.

A sharded tensor is a `DTensor` split along its first dimension (FSDP2). Optimiser, clipping and teacher average work on
the pieces, which are plain tensors. A tensor that is not sharded is its own piece.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a piece of it."""
    return isinstance(tensor, DTensor)


def piece(tensor: Tensor) -> Tensor:
    """This rank's rows, sharing memory with `tensor`."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice | None:
    """Which rows of the whole tensor this rank's piece is; None for all of them."""
    if not isinstance(tensor, DTensor):
        return None
    dim = _shard_dim(tensor)
    # as torch.chunk deals them out: equal parts, the last ones shorter or empty
    part = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
    start = min(tensor.device_mesh.get_local_rank(dim) * part, tensor.shape[0])
    return slice(start, min(start + part, tensor.shape[0]))


def assemble(own: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor of which `own` is this rank's piece, laid out as `like`; `own` where that is not sharded."""
    if not isinstance(like, DTensor):
        return own
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective of all ranks where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_group(tensors: Iterable[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that hold one copy of sharded tensors together; None where nothing is sharded."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            return tensor.device_mesh.get_group(_shard_dim(tensor))
    return None


@torch.no_grad()
def fill_whole(target: nn.Module, source: nn.Module) -> None:
    """Copies parameters and buffers of a sharded module into one of the same structure that is not; a collective."""
    into = target.state_dict()
    for key, value in source.state_dict().items():
        into[key].copy_(whole(value))


def _shard_dim(tensor: DTensor) -> int:
    """The dimension of the device mesh over which a tensor is split; the other one, if any, holds copies."""
    return next(i for i, placement in enumerate(tensor.placements) if isinstance(placement, Shard))
