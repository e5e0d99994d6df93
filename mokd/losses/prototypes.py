"""Prototypes: the weight-normalised last layer of both heads, and the logits over it.

The normalised weight is never written down: it is as large as the parameter itself. The factor `g / |v|` of every
prototype is `[K, 1]`, computed once per forward pass, and applied to one block of prototypes at a time.

Shape letters: V views, B images per rank, C width before the prototypes, K prototypes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mokd.losses.kernels import onednn
from mokd.losses.kernels.scratch import empty

_BLOCK_ROWS = 4096  # prototypes per block where logits are only written; their weight then fits a core's cache
_EPS = 1e-12  # of the norm


class PrototypeWeight(NamedTuple):
    """The weight `w = g v / |v|` by its parts: direction `v` `[K, C]`, gain `g` `[K, 1]`, `|v|` `[K, 1]` (detached)."""

    direction: Tensor
    gain: Tensor
    norm: Tensor

    @torch.no_grad()
    def scale(self, part: slice, factor: float) -> Tensor:
        """`factor * g / |v|` `[k, 1]` of some prototypes."""
        return self.gain[part] / self.norm[part] * factor

    @torch.no_grad()
    def scaled_block(self, start: int, stop: int, factor: float, out: Tensor) -> Tensor:
        """`factor * w` of some prototypes, in the memory and type of the first rows of `out`; no gradient."""
        scale = self.scale(slice(start, stop), factor)
        return torch.mul(self.direction[start:stop], scale, out=out[: stop - start])


class HeadOutput(NamedTuple):
    """Rows `[V, B, C]` before the prototypes, and the prototypes: the logits are their product."""

    rows: Tensor
    prototypes: PrototypeWeight

    @torch.no_grad()
    def logits(self, temperature: float = 1.0) -> Tensor:
        """`[V, B, K]`, over `temperature`, in fp32 or better; no gradient."""
        dtype, accumulator = product_types(self.rows)
        count = self.prototypes.direction.shape[0]
        rows = self.rows.flatten(0, 1).to(dtype)
        on_cpu = rows.device.type == "cpu"
        memory = empty([rows.shape[0] * count], accumulator, rows.device)
        out = logits_in(memory, *self.rows.shape[:2], by_prototype=on_cpu)
        flat, weight = out.flatten(0, 1), self.prototypes
        with torch.autocast(rows.device.type, enabled=False):
            if not on_cpu:
                scaled = torch.empty(weight.direction.shape, dtype=dtype, device=rows.device)
                product(rows, weight.scaled_block(0, count, 1.0 / temperature, out=scaled).T, out=flat)
                return out
            # rows are few: it is less work to scale the logits than the directions
            for start in range(0, count, _BLOCK_ROWS):
                part = slice(start, min(start + _BLOCK_ROWS, count))
                scale, directions = weight.scale(part, 1.0 / temperature), weight.direction[part].to(dtype)
                if onednn.suits(rows, directions):
                    torch.mul(onednn.logits(rows, directions).T, scale.T, out=flat[:, part])
                else:
                    product(rows, directions.T, out=flat[:, part])
                    flat[:, part].mul_(scale.T)
        return out


class Prototypes(nn.Module):
    """Weight-normalised linear layer C -> K without bias: `w = g v / |v|`, g starting at `gain`, |v| at 0.577 `scale`.

    `lends_storage`: whether the parameters may be read after the forward pass. Sharding, which frees them then, sets it
    to False; a copy is given in their place.
    """

    lends_storage = True

    def __init__(self, width: int, count: int, *, train_gain: bool, gain: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, width))
        self.gain = nn.Parameter(torch.full((count, 1), gain), requires_grad=train_gain)
        # as a linear layer's weight is by default; the length of a direction says how far a step turns it
        nn.init.uniform_(self.direction, -scale * width**-0.5, scale * width**-0.5)

    def forward(self) -> PrototypeWeight:
        """The weight by its parts; the norms are computed here, once for all rows of a pass."""
        norm = torch.linalg.vector_norm(self.direction.detach(), dim=1, keepdim=True).clamp_min(_EPS)
        return PrototypeWeight(self._lent(self.direction), self._lent(self.gain), norm)

    def _lent(self, parameter: Tensor) -> Tensor:
        # DDP looks for parameters behind the outputs' grad_fn, which a parameter itself has not, and a view has
        return parameter.view_as(parameter) if self.lends_storage else parameter.clone()


def logits_in(memory: Tensor, views: int, batch: int, *, by_prototype: bool) -> Tensor:
    """Flat memory as logits `[V, B, k]`: a prototype's logits of all rows beside one another, or a row's.

    By prototype is for CPUs: products make such logits half as fast again, and sums over prototypes need no shuffles.
    """
    if by_prototype:
        return memory.view(-1, views, batch).permute(1, 2, 0)
    return memory.view(views, batch, -1)


def product_types(rows: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """In which type rows meet prototypes, and in which the products are added up: always fp32 or better.

    Half precision only under autocast on a GPU, whose tensor cores add up in fp32. On CPUs half precision would round
    the logits themselves, and is no faster.
    """
    if rows.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda"), torch.float32
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return dtype, dtype


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, added up in the type of `out` where that is wider (GPUs only)."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
