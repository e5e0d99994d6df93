"""What is random about a view: a pure function of (seed, epoch, sample id, view index), the same in every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.config import CropConfig, ViewsConfig
from data_pipeline.sampling.counter_rng import UInt64Array, key, uniforms

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_ATTEMPTS = 10
# Draw indices of one view; a crop attempt takes four of its own, from 0 on.
_FLIP, _JITTER, _ORDER, _GREY, _BLUR, _RADIUS, _SOLARIZE = range(40, 47)
_FACTOR = 48
_VIEWS = 4
_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)


@dataclass(frozen=True)
class ViewDraws:
    """The draws of V views of B samples; all arrays are `[B, V]` or `[B, V, 4]`.

    box: int32 x, y, width, height in pixels of the stored image. flip, jitter, grey, solarize: bool. order: uint8, the
    jitter operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the order of their application. factor:
    float32, by operation; the hue's in turns. blur: float32 radius in output pixels, 0 for none.
    """

    box: NDArray[np.int32]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.bool_]
    order: NDArray[np.uint8]
    factor: NDArray[np.float32]
    grey: NDArray[np.bool_]
    blur: NDArray[np.float32]
    solarize: NDArray[np.bool_]


def draw_views(
    views: ViewsConfig, seed: int, epoch: int, sample_ids: ArrayLike, widths: ArrayLike, heights: ArrayLike
) -> ViewDraws:
    """The draws of every view of the samples, whose stored images have the given sizes (each `[B]`)."""
    samples = np.asarray(sample_ids, dtype=np.int64)
    keys = key(seed, epoch, _VIEWS, samples[:, None], np.arange(views.count)[None, :])

    def chance(draw: int, probability: float | NDArray[np.float64]) -> NDArray[np.bool_]:
        return uniforms(keys, draw) < probability

    jitter = views.jitter
    spread = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    radius_low, radius_high = views.blur_radius_px
    radius = radius_low + (radius_high - radius_low) * uniforms(keys, _RADIUS)
    blur = chance(_BLUR, _per_view(views, lambda group: group.blur_probability))
    return ViewDraws(
        box=_boxes(views, keys, np.asarray(widths, np.int64), np.asarray(heights, np.int64)),
        flip=chance(_FLIP, views.flip_probability),
        jitter=chance(_JITTER, jitter.probability),
        order=_ORDERS[(uniforms(keys, _ORDER) * len(_ORDERS)).astype(np.int64)],
        factor=(centre + spread * (2.0 * uniforms(keys[..., None], _FACTOR + np.arange(4)) - 1.0)).astype(np.float32),
        grey=chance(_GREY, views.grey_probability),
        blur=np.where(blur, radius, 0.0).astype(np.float32),
        solarize=chance(_SOLARIZE, _per_view(views, lambda group: group.solarize_probability)),
    )


def view_sizes(views: ViewsConfig) -> NDArray[np.int32]:
    """The side of every view, in view order: int32 `[V]`."""
    return np.concatenate([np.full(group.count, group.size_px, np.int32) for group in views.groups])


def _per_view(views: ViewsConfig, value: Callable[[CropConfig], float | tuple[float, ...]]) -> NDArray[np.float64]:
    """What `value` says of each group, for every view: one number for all of a group, or one for each."""
    return np.concatenate([np.broadcast_to(np.asarray(value(group), float), (group.count,)) for group in views.groups])


def _boxes(
    views: ViewsConfig, keys: UInt64Array, widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop: ten attempts at area and (log-uniform) aspect, else the central part."""
    shape = keys.shape
    low = _per_view(views, lambda group: group.area_scale[0])
    high = _per_view(views, lambda group: group.area_scale[1])
    log_low, log_high = np.log(views.aspect_ratio)
    boxes = np.empty((keys.size, 4), np.int32)
    flat_keys = keys.reshape(-1)
    width, height = (np.broadcast_to(side[:, None], shape).reshape(-1) for side in (widths, heights))
    low, high = (np.broadcast_to(edge, shape).reshape(-1) for edge in (low, high))
    todo = np.arange(keys.size)
    for attempt in range(_ATTEMPTS):
        u = uniforms(flat_keys[todo, None], 4 * attempt + np.arange(4))
        area = width[todo] * height[todo] * (low[todo] + (high[todo] - low[todo]) * u[:, 0])
        aspect = np.exp(log_low + (log_high - log_low) * u[:, 1])
        w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (w > 0) & (w <= width[todo]) & (h > 0) & (h <= height[todo])
        x = np.floor(u[:, 2] * (width[todo] - w + 1))
        y = np.floor(u[:, 3] * (height[todo] - h + 1))
        boxes[todo[fits]] = np.stack([x, y, w, h], axis=1)[fits]
        todo = todo[~fits]
        if not len(todo):
            break
    boxes[todo] = _central(width[todo], height[todo], views.aspect_ratio)
    return boxes.reshape(*shape, 4)


def _central(width: NDArray[np.int64], height: NDArray[np.int64], aspect: tuple[float, float]) -> NDArray[np.int64]:
    low, high = aspect
    ratio = width / height
    w = np.where(ratio > high, np.rint(height * high), width).astype(np.int64)
    h = np.where(ratio < low, np.rint(width / low), height).astype(np.int64)
    w, h = np.clip(w, 1, width), np.clip(h, 1, height)
    return np.stack([(width - w) // 2, (height - h) // 2, w, h], axis=-1)
