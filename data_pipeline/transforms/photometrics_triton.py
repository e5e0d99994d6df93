# mypy: allow-untyped-defs
"""Photometrics on a GPU: from packed uint8 crops to normalised views, in three launches per group of views.

Colours are computed in registers from the bytes, as often as they are needed: that costs less than writing them down.
So the only memory touched besides crops and result is, for the views that are blurred, the blur along y.
Kernels are not annotated: Triton would look up every name in an annotation and refuse it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from data_pipeline.config import ViewsConfig
from data_pipeline.core.native_library import PHOTOMETRIC

_BLOCK = tl.constexpr(1024)  # pixels that a program takes at once
_WORDS = tl.constexpr(PHOTOMETRIC.itemsize // 4)


def _word(field: str) -> tl.constexpr:
    """Where a field of PHOTOMETRIC begins, in 32-bit words."""
    fields: Any = PHOTOMETRIC.fields
    return tl.constexpr(fields[field][1] // 4)


_FACTOR, _JITTER, _GREY, _SOLARIZE = _word("factor"), _word("jitter"), _word("grey"), _word("solarize")
_KERNEL, _TAPS = _word("kernel"), _word("taps")
_CONTRAST = tl.constexpr(1)


def photometrics_triton(
    crops: Tensor, views: ViewsConfig, parameters: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One `[V_g, B, 3, S_g, S_g]` per group of views, on the device of `crops`, enqueued on its current stream.

    crops: uint8 `[B, sum 3 S_v^2]`. parameters: the bytes of PHOTOMETRIC `[B, V]` on the same device.
    """
    outs: list[Tensor] = []
    n, row_bytes = crops.shape
    rows = parameters.reshape(n, views.count, PHOTOMETRIC.itemsize)
    scale = [1.0 / (255.0 * std) for std in views.std]
    shift = [-mean / std for mean, std in zip(views.mean, views.std, strict=True)]
    start, first = 0, 0
    for group in views.groups:
        size, count = group.size_px, group.count
        out = torch.empty(count, n, 3, size, size, dtype=dtype, device=crops.device)
        mine = rows[:, first : first + count].contiguous()
        common = (crops, row_bytes, start, mine.view(torch.int32), mine.view(torch.float32))
        bases = torch.empty(n * count, device=crops.device)
        columns = torch.empty(n * count, 3, size, size, device=crops.device)
        tiles = (n * count, triton.cdiv(size * size, _BLOCK.value))
        _contrast_bases[(n * count,)](*common, bases, count, size)
        _blur_along_y[tiles](*common, bases, columns, count, size)
        threshold = float(views.solarize_threshold)
        _finish[tiles](*common, bases, columns, out, n, threshold, *scale, *shift, count, size)
        outs.append(out)
        start, first = start + count * 3 * size * size, first + count
    return tuple(outs)


@triton.jit
def _own(crops, row_bytes, start, ints, floats, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """What this program works on: its number, the first byte of its view, and the view's parameters."""
    item = tl.program_id(0).to(tl.int64)
    view = crops + (item // COUNT) * row_bytes + start + (item % COUNT) * 3 * SIZE * SIZE
    return item, view, ints + item * _WORDS, floats + item * _WORDS


@triton.jit
def _grey_of(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _hsv_channel(n, h, value, chroma):
    """Channel n of a colour of hue h in sixths of the circle."""
    k = n + h
    k = tl.where(k >= 6.0, k - 6.0, k)
    t = tl.minimum(tl.minimum(k, 4.0 - k), 1.0)
    return value - chroma * tl.maximum(t, 0.0)


@triton.jit
def _hue(r, g, b, turn):
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    inverse = 1.0 / tl.where(chroma > 0.0, chroma, 1.0)
    h = tl.where(value == g, 2.0 + (b - r) * inverse, 4.0 + (r - g) * inverse)
    h = tl.where(value == r, (g - b) * inverse, h) + 6.0 * turn + 6.0
    h = tl.where(h >= 12.0, h - 12.0, h)
    h = tl.where(h >= 6.0, h - 6.0, h)
    return _hsv_channel(5.0, h, value, chroma), _hsv_channel(3.0, h, value, chroma), _hsv_channel(1.0, h, value, chroma)


@triton.jit
def _change(r, g, b, operation, factor, base):
    """One operation of the jitter: 0 brightness, 1 contrast (towards `base`), 2 saturation, 3 hue."""
    if operation == 3:
        r, g, b = _hue(r, g, b, factor)
    else:
        towards = tl.where(operation == 2, _grey_of(r, g, b), tl.where(operation == 1, base, 0.0))
        rest = (1.0 - factor) * towards
        r, g, b = _clamped(rest + factor * r), _clamped(rest + factor * g), _clamped(rest + factor * b)
    return r, g, b


@triton.jit
def _load(view, pixel, mask, SIZE: tl.constexpr):
    r = tl.load(view + pixel, mask=mask, other=0).to(tl.float32)
    g = tl.load(view + SIZE * SIZE + pixel, mask=mask, other=0).to(tl.float32)
    b = tl.load(view + 2 * SIZE * SIZE + pixel, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _coloured(view, ints, floats, base, pixel, mask, SIZE: tl.constexpr):
    """The pixels after jitter and grey."""
    r, g, b = _load(view, pixel, mask, SIZE)
    if tl.load(ints + _JITTER) != 0:
        for step in tl.static_range(4):
            operation = tl.load(ints + step)
            r, g, b = _change(r, g, b, operation, tl.load(floats + _FACTOR + operation), base)
    if tl.load(ints + _GREY) != 0:
        grey = _grey_of(r, g, b)
        r, g, b = grey, grey, grey
    return r, g, b


@triton.jit
def _contrast_bases(crops, row_bytes, start, ints, floats, bases, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The mean grey level of each view when its contrast is changed. One program per view: no order of sums to vary."""
    item, view, ints, floats = _own(crops, row_bytes, start, ints, floats, COUNT, SIZE)
    if tl.load(ints + _JITTER) != 0:
        total = tl.zeros([_BLOCK], tl.float32)
        for begin in range(0, SIZE * SIZE, _BLOCK):
            pixel = begin + tl.arange(0, _BLOCK)
            mask = pixel < SIZE * SIZE
            r, g, b = _load(view, pixel, mask, SIZE)
            before = tl.load(ints + _JITTER)
            for step in tl.static_range(4):
                operation = tl.load(ints + step)
                before = tl.where(operation == _CONTRAST, 0, before)
                if before != 0:
                    r, g, b = _change(r, g, b, operation, tl.load(floats + _FACTOR + operation), 0.0)
            total += tl.where(mask, _grey_of(r, g, b), 0.0)
        tl.store(bases + item, tl.sum(total) / (SIZE * SIZE))


@triton.jit
def _blur_along_y(crops, row_bytes, start, ints, floats, bases, columns, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Colours and the blur along y of the views that are blurred; pixels beyond an edge repeat it."""
    item, view, ints, floats = _own(crops, row_bytes, start, ints, floats, COUNT, SIZE)
    taps = tl.load(ints + _TAPS)
    if taps > 1:
        pixel = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
        mask = pixel < SIZE * SIZE
        x, y = pixel % SIZE, pixel // SIZE
        # without jitter nobody has written a base, and nobody looks at it
        base = tl.load(bases + item)
        r, g, b = _coloured(view, ints, floats, base, pixel, mask, SIZE)
        weight = tl.load(floats + _KERNEL)
        r, g, b = r * weight, g * weight, b * weight
        for t in range(1, taps):
            weight = tl.load(floats + _KERNEL + t)
            above, below = tl.maximum(y - t, 0) * SIZE + x, tl.minimum(y + t, SIZE - 1) * SIZE + x
            r1, g1, b1 = _coloured(view, ints, floats, base, above, mask, SIZE)
            r2, g2, b2 = _coloured(view, ints, floats, base, below, mask, SIZE)
            r, g, b = r + weight * (r1 + r2), g + weight * (g1 + g2), b + weight * (b1 + b2)
        to = columns + item * 3 * SIZE * SIZE + pixel
        tl.store(to, r, mask=mask)
        tl.store(to + SIZE * SIZE, g, mask=mask)
        tl.store(to + 2 * SIZE * SIZE, b, mask=mask)


@triton.jit
def _along_x(column, floats, taps, pixel, mask, SIZE: tl.constexpr):
    x, row = pixel % SIZE, pixel // SIZE * SIZE
    total = tl.load(column + pixel, mask=mask, other=0.0) * tl.load(floats + _KERNEL)
    for t in range(1, taps):
        left = tl.load(column + row + tl.maximum(x - t, 0), mask=mask, other=0.0)
        right = tl.load(column + row + tl.minimum(x + t, SIZE - 1), mask=mask, other=0.0)
        total += tl.load(floats + _KERNEL + t) * (left + right)
    return total


@triton.jit
def _store(to, x, solarize, threshold, scale, shift, mask):
    x = tl.where((solarize != 0) & (x >= threshold), 255.0 - x, x)
    tl.store(to, (x * scale + shift).to(to.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    crops,
    row_bytes,
    start,
    ints,
    floats,
    bases,
    columns,
    out,
    batch,
    threshold,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The blur along x, or else the colours; then solarise and normalise."""
    item, view, ints, floats = _own(crops, row_bytes, start, ints, floats, COUNT, SIZE)
    pixel = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    mask = pixel < SIZE * SIZE
    taps = tl.load(ints + _TAPS)
    if taps > 1:
        column = columns + item * 3 * SIZE * SIZE
        r = _along_x(column, floats, taps, pixel, mask, SIZE)
        g = _along_x(column + SIZE * SIZE, floats, taps, pixel, mask, SIZE)
        b = _along_x(column + 2 * SIZE * SIZE, floats, taps, pixel, mask, SIZE)
    else:
        r, g, b = _coloured(view, ints, floats, tl.load(bases + item), pixel, mask, SIZE)
    solarize = tl.load(ints + _SOLARIZE)
    to = out + ((item % COUNT) * batch + item // COUNT) * 3 * SIZE * SIZE + pixel
    _store(to, r, solarize, threshold, scale_r, shift_r, mask)
    _store(to + SIZE * SIZE, g, solarize, threshold, scale_g, shift_g, mask)
    _store(to + 2 * SIZE * SIZE, b, solarize, threshold, scale_b, shift_b, mask)
