"""A configuration's branches on a GPU that is not there: fake tensors have a device, types and shapes, and no values.

Whatever would make the host wait for a number raises. Collectives go to torch's fake process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mokd.config import RunConfig
from mokd.losses import prototype_loss
from mokd.losses.kernels import plain
from mokd.models import sync_batchnorm
from mokd.objectives.base import build_objective, build_pair
from mokd.objectives.branch import Branch, single_process
from mokd.optim.precision import view_dtype
from mokd.parallel.parallelize import _use_channels_last

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """This process as the first of so many ranks, whose collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class FakeStep(NamedTuple):
    """What a step needs, on fake CUDA tensors."""

    objective: Any
    branches: list[Branch]
    views: list[Tensor]


@contextmanager
def fake_step(config: RunConfig, images: int) -> Iterator[FakeStep]:
    """A rank's networks as DDP would get them, and its views. Within, losses take the torch kernels: Triton launches
    are no operations that a fake tensor could see.
    """
    with torch.device("meta"):
        meta = build_objective(config, torch.device("meta"))
        pairs = [build_pair(meta, branch, images) for branch in config.branches]
    for pair in pairs:
        for network in (pair.student, pair.teacher):
            _use_channels_last(network, weights_too=True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(prototype_loss, "_kernels", return_value=plain))
        # without a driver autocast would turn itself off
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        # and torch would choose the attention that is not fused
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash))
        for kept in (prototype_loss._constant, sync_batchnorm._counts):  # fake constants are no use to others
            stack.callback(kept.cache_clear)
        stack.enter_context(FakeTensorMode())
        branches = []
        for branch, pair in zip(config.branches, pairs, strict=True):
            for network in (pair.student, pair.teacher):
                sync_batchnorm.synchronize_batchnorm(network, CUDA)
                _place(network)
            optimizer: Any = SimpleNamespace()  # forward and losses need none
            branches.append(Branch(branch, pair, single_process(pair), optimizer))
        dtype = view_dtype(config.precision, CUDA)
        shapes = [(group.count, images, 3, group.size_px, group.size_px) for group in config.views.groups]
        views = [torch.empty(shape, device=CUDA, dtype=dtype) for shape in shapes]
        yield FakeStep(build_objective(config, CUDA), branches, views)


def _flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _place(network: nn.Module) -> None:
    """Gives parameters and buffers on meta a place on the fake device."""
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    placed = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(placed, tensor.requires_grad) if is_parameter else placed


class Launches(TorchDispatchMode):
    """Counts operations that launch something; products by name and type; collectives; what ran on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.products: Counter[tuple[str, torch.dtype]] = Counter()
        self.collectives: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space in ("c10d", "_c10d_functional"):
            self.collectives[name] += name != "wait_tensor"
            return out
        if space != "aten":
            return out
        first = next((tensor for tensor in args if isinstance(tensor, Tensor)), None)
        if func.is_view or name in _WITHOUT_LAUNCH:
            return out
        self.operations[name] += 1
        if name in _PRODUCTS:
            self.products[name, first.dtype] += 1  # type: ignore[union-attr]
        if first is not None and first.device.type != "cuda":
            self.elsewhere[name] += 1
        return out


_WITHOUT_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "_reshape_alias"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
