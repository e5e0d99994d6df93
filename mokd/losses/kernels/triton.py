# mypy: allow-untyped-defs
"""The fused loss on a block of logits, on a GPU: one launch for each of the two passes.

A program has all views of one image over one tile of prototypes. So targets are read once for all views, the sum of a
paired term's targets is formed in registers, and every logit is read once and written once. Kernels are not annotated:
Triton would look up every name in an annotation and refuse it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mokd.losses.kernels import plain
from mokd.losses.kernels.targets import Cut, Cuts

BY_PROTOTYPE = False
TAKES_SCALE = False
_TILE = 1024


def observe(z: Tensor, raw: Tensor, scale: float | Tensor, cuts: Cuts, dots: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.observe`; rows are cut into tiles."""
    if raw is not z:
        torch.mul(raw, scale, out=z)
    if not _fits(cuts):
        return plain.observe(z, z, 1.0, cuts, dots)
    views, batch, count = z.shape
    tiles = triton.cdiv(count, _TILE)
    largest, total = (torch.empty(views, batch, tiles, device=z.device) for _ in range(2))
    partial = torch.zeros(3, batch, tiles, device=z.device)
    arguments, constants, places = _describe(cuts, z)
    _observe[(batch, tiles)](z, *z.stride()[:2], *arguments, largest, total, partial, *z.shape, tiles, **constants)
    for i, place in enumerate(places):  # indexing by the list would bring it to the device, and the host would wait
        dots[i] += partial[place].sum(dtype=dots.dtype)
    return largest, total


def gradient(
    x: Tensor, factor: Tensor, cuts: Cuts, dtype: torch.dtype, largest: Tensor | None, scale: Tensor | None
) -> Tensor:
    """As `plain.gradient`."""
    if scale is not None or not _fits(cuts):
        return plain.gradient(x, factor, cuts, dtype, largest, scale)
    batch, tiles = factor.shape[1:]
    out = x if dtype == x.dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    arguments, constants, _ = _describe(cuts, x)
    constants["LOGITS"] = largest is not None
    of_rows = (factor.contiguous(), factor if largest is None else largest)
    written = (out, *out.stride()[:2])
    _gradient[(batch, tiles)](x, *x.stride()[:2], *arguments, *of_rows, *written, *x.shape, tiles, **constants)
    return out


through_norm = plain.through_norm


def _fits(cuts: Cuts) -> bool:
    """Two paired terms and one by row are all that the objective has; more go the other way."""
    paired = [cut for cut in cuts if cut.paired]
    teachers = {cut.probabilities.shape[0] for cut in paired}
    single = all(cut.probabilities.dtype == torch.float32 for cut in cuts)
    return single and len(paired) <= 2 and len(teachers) <= 1 and len(cuts) - len(paired) <= 1


def _describe(cuts: Cuts, z: Tensor) -> tuple[list[Any], dict[str, Any], list[int]]:
    """Kernel arguments and constants for the terms, and at which of the kernel's three places every term is."""
    paired = [i for i, cut in enumerate(cuts) if cut.paired]
    by_row = [i for i, cut in enumerate(cuts) if not cut.paired]
    slots: list[Cut | None] = [None, None, None]
    places = [0] * len(cuts)
    for place, i in [*enumerate(paired), *((2, i) for i in by_row)]:
        slots[place], places[i] = cuts[i], place
    arguments: list[Any] = []
    for cut in slots:
        p = z if cut is None else cut.probabilities
        arguments += [p, *p.stride()[:2], 0.0 if cut is None else cut.factor]
    constants = {
        "TEACHERS": cuts[paired[0]].probabilities.shape[0] if paired else 0,
        "PAIRED": len(paired),
        "BY_ROW": bool(by_row),
        "FIRST": cuts[by_row[0]].first_view if by_row else 0,
        "TILE": _TILE,
    }
    return arguments, constants, places


@triton.jit
def _sum_of_teachers(p, stride_view, stride_image, image, k, mask, TEACHERS: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros([TILE], tl.float32)
    for q in tl.static_range(TEACHERS):
        total += tl.load(p + q * stride_view + image * stride_image + k, mask=mask, other=0.0)
    return total


@triton.jit
def _met(p, stride_view, stride_image, image, view, all_of_them, k, mask, TEACHERS: tl.constexpr):
    """What a view meets of a paired term: the sum of all teachers, less its own."""
    own = tl.load(p + view * stride_view + image * stride_image + k, mask=mask & (view < TEACHERS), other=0.0)
    return all_of_them - own


@triton.jit
def _observe(
    z,
    z_view,
    z_image,
    p0,
    p0_view,
    p0_image,
    factor0,
    p1,
    p1_view,
    p1_image,
    factor1,
    p2,
    p2_view,
    p2_image,
    factor2,
    largest,
    total,
    partial,
    views,
    batch,
    count,
    tiles,
    TEACHERS: tl.constexpr,
    PAIRED: tl.constexpr,
    BY_ROW: tl.constexpr,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Leaves exp(z - largest of the tile) in z; the largest, the sum of these exponentials, the terms' dot products."""
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    k = tile * TILE + tl.arange(0, TILE)
    mask = k < count
    zero = tl.zeros([TILE], tl.float32)
    sum0, sum1, dot0, dot1, dot2 = zero, zero, zero, zero, zero
    if PAIRED > 0:
        sum0 = _sum_of_teachers(p0, p0_view, p0_image, image, k, mask, TEACHERS, TILE)
    if PAIRED > 1:
        sum1 = _sum_of_teachers(p1, p1_view, p1_image, image, k, mask, TEACHERS, TILE)
    for view in range(views):
        here = z + view * z_view + image * z_image + k
        x = tl.load(here, mask=mask, other=0.0)
        if PAIRED > 0:
            dot0 += x * _met(p0, p0_view, p0_image, image, view, sum0, k, mask, TEACHERS)
        if PAIRED > 1:
            dot1 += x * _met(p1, p1_view, p1_image, image, view, sum1, k, mask, TEACHERS)
        if BY_ROW and view >= FIRST:
            dot2 += x * tl.load(p2 + (view - FIRST) * p2_view + image * p2_image + k, mask=mask, other=0.0)
        top = tl.max(tl.where(mask, x, float("-inf")), axis=0)
        e = tl.where(mask, tl.exp(x - top), 0.0)
        tl.store(here, e, mask=mask)
        place = (view * batch + image) * tiles + tile
        tl.store(largest + place, top)
        tl.store(total + place, tl.sum(e, axis=0))
    to = partial + image * tiles + tile
    tl.store(to, tl.sum(dot0, axis=0))
    tl.store(to + batch * tiles, tl.sum(dot1, axis=0))
    tl.store(to + 2 * batch * tiles, tl.sum(dot2, axis=0))


@triton.jit
def _gradient(
    x,
    x_view,
    x_image,
    p0,
    p0_view,
    p0_image,
    factor0,
    p1,
    p1_view,
    p1_image,
    factor1,
    p2,
    p2_view,
    p2_image,
    factor2,
    factor,
    largest,
    out,
    out_view,
    out_image,
    views,
    batch,
    count,
    tiles,
    LOGITS: tl.constexpr,
    TEACHERS: tl.constexpr,
    PAIRED: tl.constexpr,
    BY_ROW: tl.constexpr,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    """The exponentials (of the logits, where these are given) times their row's factor, less all targets."""
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    k = tile * TILE + tl.arange(0, TILE)
    mask = k < count
    sum0, sum1 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    if PAIRED > 0:
        sum0 = _sum_of_teachers(p0, p0_view, p0_image, image, k, mask, TEACHERS, TILE)
    if PAIRED > 1:
        sum1 = _sum_of_teachers(p1, p1_view, p1_image, image, k, mask, TEACHERS, TILE)
    for view in range(views):
        place = (view * batch + image) * tiles + tile
        g = tl.load(x + view * x_view + image * x_image + k, mask=mask, other=0.0)
        if LOGITS:
            g = tl.exp(g - tl.load(largest + place))
        g *= tl.load(factor + place)
        if PAIRED > 0:
            g -= factor0 * _met(p0, p0_view, p0_image, image, view, sum0, k, mask, TEACHERS)
        if PAIRED > 1:
            g -= factor1 * _met(p1, p1_view, p1_image, image, view, sum1, k, mask, TEACHERS)
        if BY_ROW and view >= FIRST:
            g -= factor2 * tl.load(p2 + (view - FIRST) * p2_view + image * p2_image + k, mask=mask, other=0.0)
        tl.store(out + view * out_view + image * out_image + k, g.to(out.dtype.element_ty), mask=mask)
