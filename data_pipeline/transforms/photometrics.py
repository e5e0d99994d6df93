"""From packed uint8 crops and draws to normalised views: colour jitter, grey, blur, solarise, normalise.

Definitions are torchvision's and Pillow's. Pillow rounds to 8 bits after every operation and torchvision's hue goes
through 8-bit HSV; here everything stays in floating point, and that is the whole difference. Three implementations
share the parameters: the native library (CPU), `photometrics_triton` (GPU, three channels), and plain torch (any
device, and the one to read first). Of other than three channels, saturation, hue and grey are left out, and contrast
works towards the mean of all channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.config import ViewsConfig
from data_pipeline.core.errors import UserError
from data_pipeline.core.host_memory import Packed, Recycler
from data_pipeline.core.native_library import KERNEL_TAPS, KINDS, PHOTOMETRIC, Engine
from data_pipeline.sampling.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewDraws, view_sizes

MAX_BLUR_RADIUS = 5.0  # what Pillow's three boxes reach with it stays within the taps

_GREY = (0.299, 0.587, 0.114)


def check_views(views: ViewsConfig) -> None:
    """Raises UserError for a blur that no implementation reaches."""
    if views.blur_radius_px[1] > MAX_BLUR_RADIUS:
        raise UserError(
            f"views.blur_radius_px: given {views.blur_radius_px[1]:g}, expected at most {MAX_BLUR_RADIUS:g}"
        )


def blur_kernels(radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """The kernel of Pillow's GaussianBlur for each radius, centre first: float32 `[..., KERNEL_TAPS]`.

    Pillow applies three extended box filters (a box with fractional ends) per axis; this is their convolution.
    """
    variance = radius.astype(np.float64) ** 2 / 3.0
    # the box 2 r + 1 wide plus fractional ends that has a third of the variance
    whole = np.floor((np.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance) / (6.0 * (variance - (whole + 1) ** 2))
    width = 2 * whole + 1 + 2 * edge
    reach = KERNEL_TAPS - 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.where(distance <= whole[..., None], 1.0, np.where(distance == whole[..., None] + 1, edge[..., None], 0.0))
    box /= width[..., None]
    once = np.fft.rfft(box, 6 * KERNEL_TAPS, axis=-1)
    kernel = np.fft.irfft(once**3, 6 * KERNEL_TAPS, axis=-1)
    return np.asarray(np.maximum(kernel[..., 3 * reach : 3 * reach + KERNEL_TAPS], 0.0), np.float32)


def pack_parameters(draws: ViewDraws) -> NDArray[Any]:
    """The colour part of the draws in the layout that all implementations read: PHOTOMETRIC `[B, V]`."""
    packed = np.zeros(draws.flip.shape, PHOTOMETRIC)
    packed["order"], packed["factor"] = draws.order, draws.factor
    packed["jitter"], packed["grey"], packed["solarize"] = draws.jitter, draws.grey, draws.solarize
    blurred = draws.blur > 0
    kernels = blur_kernels(draws.blur[blurred])
    packed["kernel"][blurred] = kernels
    # taps that weigh less than rounding to 8 bits can show are not worth their time
    packed["taps"][blurred] = (kernels > 1e-5).sum(-1)
    return packed


class CpuPhotometrics:
    """The colour changes of a batch on the CPU, by the threads of the native library."""

    def __init__(self, views: ViewsConfig, dtype: torch.dtype, engine: Engine) -> None:
        self._kind = str(dtype).removeprefix("torch.")
        if self._kind not in KINDS:
            raise UserError(f"precision: {dtype} views are not made; expected one of {', '.join(KINDS)}")
        self._views, self._dtype, self._engine = views, dtype, engine
        self._sizes, self._memory = view_sizes(views), Recycler(keep=4)

    def __call__(self, packed: Packed) -> tuple[Tensor, ...]:
        """One `[V_g, B, C, S_g, S_g]` per group of views. Their memory is the caller's until it lets go of them."""
        views, count = self._views, len(packed.crops)
        shapes = [(group.count, count, views.channels, group.size_px, group.size_px) for group in views.groups]
        outs = [self._memory.empty(shape, self._dtype) for shape in shapes]
        addresses = [view.data_ptr() for out in outs for view in out]
        parameters = packed.parameters.view(PHOTOMETRIC)
        common = (float(views.solarize_threshold), views.mean, views.std)
        self._engine.photometrics(packed.crops, self._sizes, parameters, *common, addresses, self._kind)
        return tuple(outs)


def photometrics_torch(
    crops: Tensor, views: ViewsConfig, parameters: NDArray[Any], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The same in torch, on the device of `crops`: operations on the whole batch, chosen per view by its draws.

    crops: uint8 `[B, sum C S_v^2]`. parameters: PHOTOMETRIC `[B, V]`.
    """
    outs: list[Tensor] = []
    start, first, channels = 0, 0, views.channels
    for group in views.groups:
        size, n = group.size_px, len(crops)
        end = start + group.count * channels * size * size
        x = crops[:, start:end].reshape(n, group.count, channels, size, size).float()
        x = _change_colours(x, views, parameters[:, first : first + group.count])
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (views.mean, views.std))
        outs.append(((x / 255.0 - mean) / std).transpose(0, 1).contiguous().to(dtype))
        start, first = end, first + group.count
    return tuple(outs)


def _change_colours(x: Tensor, views: ViewsConfig, p: NDArray[Any]) -> Tensor:
    """x: `[B, V, C, S, S]` in 0..255."""
    colours = x.shape[-3] == 3  # saturation, hue and grey are of three channels alone

    def column(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(x.device)[..., None, None, None]

    for step in range(4):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE) if colours else (BRIGHTNESS, CONTRAST):
            chosen = (p["jitter"] > 0) & (p["order"][..., step] == operation)
            if chosen.any():
                x = torch.where(column(chosen), _changed(x, operation, column(p["factor"][..., operation])), x)
    if colours:
        x = torch.where(column(p["grey"] > 0), _grey(x).expand_as(x), x)
    blurred = p["taps"] > 0
    if blurred.any():
        kernels = torch.from_numpy(np.ascontiguousarray(p["kernel"])).to(x.device)
        x = torch.where(column(blurred), _blur(x, kernels), x)
    return torch.where(column(p["solarize"] > 0) & (x >= views.solarize_threshold), 255.0 - x, x)


def _grey(x: Tensor) -> Tensor:
    """The grey level: luma of three channels, the mean of any other number."""
    if x.shape[-3] != 3:
        return x.mean(-3, keepdim=True)
    return (x * torch.tensor(_GREY, device=x.device).view(3, 1, 1)).sum(-3, keepdim=True)


def _changed(x: Tensor, operation: int, factor: Tensor) -> Tensor:
    """One operation of the jitter: a turn of the hue, or away from or towards black, the mean grey, the grey level."""
    if operation == HUE:
        return _hue(x, factor)
    base: Tensor | float = 0.0 if operation == BRIGHTNESS else _grey(x)
    if operation == CONTRAST:
        base = _grey(x).mean(dim=(-2, -1), keepdim=True)
    return (base + factor * (x - base)).clamp(0.0, 255.0)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    r, g, b = x.unbind(-3)
    value, low = x.amax(-3), x.amin(-3)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    h = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    h = (h + 6.0 * turn.squeeze(-3)).remainder(6.0)

    def channel(n: float) -> Tensor:
        k = (n + h).remainder(6.0)
        return value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)

    return torch.stack([channel(5.0), channel(3.0), channel(1.0)], dim=-3)


def _blur(x: Tensor, kernels: Tensor) -> Tensor:
    """kernels: `[B, V, KERNEL_TAPS]`; pixels beyond an edge repeat it."""
    reach = KERNEL_TAPS - 1
    shape = x.shape
    full = torch.cat([kernels.flip(-1), kernels[..., 1:]], dim=-1).reshape(-1, 1, 2 * reach + 1)
    full = full.repeat_interleave(shape[-3], 0)
    flat = x.reshape(1, -1, *shape[-2:])
    flat = torch.nn.functional.pad(flat, (reach, reach, reach, reach), mode="replicate")
    flat = torch.nn.functional.conv2d(flat, full[..., None, :], groups=len(full))
    return torch.nn.functional.conv2d(flat, full[..., :, None], groups=len(full)).reshape(shape)
