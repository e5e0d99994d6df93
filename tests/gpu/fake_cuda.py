"""A configuration's branches on a GPU that is not there: fake tensors have a device, types and shapes, and no values.

Whatever would make the host wait for a number raises. Collectives go to torch's fake process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mokd.config import RunConfig
from mokd.distributed.host_copy import constant
from mokd.losses import prototype_loss
from mokd.losses.kernels import plain
from mokd.models import sync_batchnorm
from mokd.objectives.base import build_objective, build_pair
from mokd.objectives.branch import Branch, single_process
from mokd.optim.optimizer import BranchOptimizer
from mokd.optim.precision import view_dtype
from mokd.parallel.parallelize import _use_channels_last

CUDA = torch.device("cuda", 0)
EPOCH_STEPS = 1000
_shapes = torch.library.Library("aten", "IMPL", "Meta")  # of operations that torch knows on devices only


def _reduced_shapes(grad: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(mean) for _ in range(4))


def _towards_shape(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


_shapes.impl("batch_norm_backward_reduce", _reduced_shapes)
_shapes.impl("batch_norm_backward_elemt", _towards_shape)
_shapes.impl("_fused_sgd_", lambda *tensors, **settings: None)


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
        # fake constants are no use to others
        for kept in (constant, sync_batchnorm._counts):
            stack.callback(kept.cache_clear)
        stack.enter_context(FakeTensorMode())
        branches = []
        for branch, pair in zip(config.branches, pairs, strict=True):
            for network in (pair.student, pair.teacher):
                sync_batchnorm.synchronize_batchnorm(network, CUDA)
                _place(network)
                network.lend_weights()
            optimizer = BranchOptimizer(pair.student, branch, config.optim, config.lr_scale, EPOCH_STEPS)
            branches.append(Branch(branch, pair, single_process(pair), optimizer))
        dtype = view_dtype(config.precision, CUDA)
        shapes = [(group.count, images, 3, group.size_px, group.size_px) for group in config.views.groups]
        views = [torch.empty(shape, device=CUDA, dtype=dtype) for shape in shapes]
        yield FakeStep(build_objective(config, CUDA), branches, views)


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """The backward pass node by node, in this thread: autograd's own engine asks the driver for a stream of each.

    What it adds up where a tensor was used more than once is added up here too. Gradients are left as they come, as
    DDP's views of buckets do.
    """
    root: Any = loss.grad_fn
    edges_into: Counter[Any] = Counter()
    todo = [root]
    nodes = {root}  # which also keeps them: autograd makes another Python object for a node that nobody holds
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                edges_into[node] += 1
                if node not in nodes:
                    nodes.add(node)
                    todo.append(node)
    given: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    while ready:
        node = ready.pop()
        inputs = given.pop(node, {})
        if hasattr(node, "variable"):
            if inputs:
                node.variable.grad = inputs[0]
            continue
        # our own functions take their tensors first: what they return for other arguments is None
        call = node if callable(node) else node.apply
        out: Any = call(*[inputs.get(i) for i in range(len(node._input_metadata))]) if inputs else ()
        gradients = iter(out if isinstance(out, tuple) else (out,))
        for following, number in node.next_functions:
            gradient = next(gradients, None)
            if following is None:
                continue
            if gradient is not None:
                meta = following._input_metadata[number]  # the engine undoes what was broadcast, and casts
                gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)
                theirs = given.setdefault(following, {})
                theirs[number] = theirs[number] + gradient if number in theirs else gradient
            edges_into[following] -= 1
            if edges_into[following] == 0:
                ready.append(following)


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
        self.operations[name] += _batches(args) if name.startswith(("_foreach_", "_fused_")) else 1
        if name in _PRODUCTS:
            self.products[name, first.dtype] += 1  # type: ignore[union-attr]
        if first is not None and first.device.type != "cuda":
            self.elsewhere[name] += 1
        return out


def _batches(args: Any) -> int:
    """Launches of an operation on lists of tensors: as many tensors, and blocks of their elements, as one can take."""
    lists = [given for given in args if isinstance(given, (list, tuple)) and given and isinstance(given[0], Tensor)]
    most = {1: 110, 2: 64, 3: 48, 4: 36}.get(len(lists), 30)
    launches, tensors, blocks = 1, 0, 0
    for tensor in lists[0]:
        if tensors == most:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors += 1
        blocks += -(-tensor.numel() // 65536)
        if blocks > 320:  # what is left of the tensor opens the next one
            launches, tensors, blocks = launches + (blocks - 1) // 320, 1, (blocks - 1) % 320 + 1
    return launches


_WITHOUT_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "_reshape_alias"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
