"""Weights as products in half precision take them, cast for a whole network at a time.

Autocast casts every weight by itself, and autograd casts every gradient by itself and adds up those of every size of
crops: some four launches a parameter, a third of those of a step on a GPU. Instead other tensors lie in the places of a
network's parameters while it is called: copies in half precision of what `nn.Linear` and `nn.Conv2d` hold, views of the
parameter elsewhere, of their own for each size of crops. Forwards that is one cast, backwards one sum and one cast, on
lists of tensors, which take a few launches. The bits are those of autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mokd.losses.prototypes import Prototypes
from mokd.models.linear import OneDnnLinear

# exactly these: a class derived from one may do arithmetic with its weight, which belongs in fp32
_OF_PRODUCTS = (nn.Linear, OneDnnLinear, nn.Conv2d)
# gradients that are finished together, in bytes: a bucket of DDP's, whose mean need not wait for the others
_TOGETHER = 25 * 2**20


class _Place(NamedTuple):
    """Where a parameter lies: the modules' own dictionaries, with its name in each; and whether products take it."""

    holders: list[tuple[dict[str, Any], str]]
    of_products: bool

    @property
    def parameter(self) -> nn.Parameter:
        holder, name = self.holders[0]
        parameter: nn.Parameter = holder[name]
        return parameter

    def put(self, tensor: Tensor) -> None:
        for holder, name in self.holders:
            holder[name] = tensor


class LentWeights:
    """What a network computes with in its parameters' places; those of `Prototypes` stay, as the loss takes them."""

    def __init__(self, network: nn.Module) -> None:
        found: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in network.modules():
            if not isinstance(module, Prototypes):
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        found.setdefault(parameter, []).append((module, name))
        self._places = [
            _Place([(m._parameters, name) for m, name in holders], all(type(m) in _OF_PRODUCTS for m, _ in holders))
            for holders in found.values()
        ]

    def calls(self, count: int, part: nn.Module, device: torch.device) -> list[AbstractContextManager[None]]:
        """What each of so many calls of `part`, or of parts of it, is to run in; each may be entered again."""
        if not torch.is_autocast_enabled(device.type):
            return [nullcontext()] * count
        dtype = torch.get_autocast_dtype(device.type)
        within = {id(module._parameters) for module in part.modules()}
        places = [(place, place.parameter) for place in self._places if id(place.holders[0][0]) in within]
        learns = [torch.is_grad_enabled() and parameter.requires_grad for _, parameter in places]
        fixed = [pair for pair, learning in zip(places, learns, strict=True) if not learning and pair[0].of_products]
        copies = _in_half([parameter for _, parameter in fixed], dtype)
        lent = [[(*pair, copy) for pair, copy in zip(fixed, copies, strict=True)] for _ in range(count)]
        for group in _groups([pair for pair, learning in zip(places, learns, strict=True) if learning]):
            of_products = [place.of_products for place, _ in group]
            tensors = _Lend.apply(*[parameter for _, parameter in group], dtype, of_products, count)
            for call, entries in enumerate(lent):
                own = tensors[call * len(group) : (call + 1) * len(group)]
                entries += [(*pair, tensor) for pair, tensor in zip(group, own, strict=True)]
        return [_Lent(entries) for entries in lent]


class _Lent(AbstractContextManager[None]):
    """Within, tensors lie in the places of parameters."""

    def __init__(self, entries: Sequence[tuple[_Place, nn.Parameter, Tensor]]) -> None:
        self._entries = entries

    def __enter__(self) -> None:
        for place, _, tensor in self._entries:
            place.put(tensor)

    def __exit__(self, *_: object) -> None:
        for place, parameter, _tensor in self._entries:
            place.put(parameter)


def _groups(places: Sequence[tuple[_Place, nn.Parameter]]) -> Iterator[list[tuple[_Place, nn.Parameter]]]:
    """In their order; gradients of a group are finished together."""
    group, size = [], 0
    for place, parameter in places:
        group.append((place, parameter))
        size += 4 * parameter.numel()
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _in_half(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
    if copies:
        torch._foreach_copy_(copies, list(parameters))
    return copies


class _Lend(torch.autograd.Function):
    """Parameters to as many tensors for every call: copies in half precision, or views, of the same memory."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """The parameters, the type of the copies, which of them products take, the number of calls."""
        *parameters, dtype, of_products, calls = arguments
        ctx.parameters = parameters
        ctx.halved = [i for i, half in enumerate(of_products) if half]
        ctx.set_materialize_grads(False)
        shared = list(parameters)
        for i, copy in zip(ctx.halved, _in_half([parameters[i] for i in ctx.halved], dtype), strict=True):
            shared[i] = copy
        return tuple(tensor.view_as(tensor) for _ in range(calls) for tensor in shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Sums over the calls, the last one first, as autograd adds them up, in the type in which they come."""
        count, halved = len(ctx.parameters), ctx.halved
        exact = sorted({*range(count)} - {*halved})
        total = dict[int, Tensor]()
        for start in range(len(gradients) - count, -1, -count):
            given = {i: g for i, g in enumerate(gradients[start : start + count]) if g is not None}
            for alike in (halved, exact):  # a list of one type, or it would be a launch for each
                both = [i for i in alike if i in given and i in total]
                if both:
                    sums = torch._foreach_add([total[i] for i in both], [given[i] for i in both])
                    given.update(zip(both, sums, strict=True))
            total |= given
        rounded = [i for i in halved if i in total]
        if rounded:
            wide = [torch.empty_like(ctx.parameters[i]) for i in rounded]
            torch._foreach_copy_(wide, [total[i] for i in rounded])
            total.update(zip(rounded, wide, strict=True))
        return *[total.get(i) for i in range(count)], None, None, None
