"""Random numbers as a pure function of integers: no state, the same on every machine and in every process."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt64Array = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(x: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64: a bijection in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: ArrayLike) -> UInt64Array:
    """One 64-bit key per entry of the (broadcast) non-negative integers `parts`; other parts, other stream."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = mix((state + _GAMMA) ^ mix(np.atleast_1d(np.asarray(part)).astype(np.uint64) + _GAMMA))
    return state


def integers(keys: UInt64Array, draw: ArrayLike) -> UInt64Array:
    """64 random bits for every key and draw index (broadcast): splitmix64, entered at any place."""
    with np.errstate(over="ignore"):
        return mix(keys + (np.asarray(draw).astype(np.uint64) + np.uint64(1)) * _GAMMA)


def uniforms(keys: UInt64Array, draw: ArrayLike) -> NDArray[np.float64]:
    """A float64 in [0, 1) for every key and draw index (broadcast)."""
    return (integers(keys, draw) >> np.uint64(11)).astype(np.float64) * 2.0**-53
