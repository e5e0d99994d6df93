"""Confidence intervals of accuracies and of their difference, by the bootstrap over test images and over seeds.

Shape letters: P pair runs, S solo runs, M test images, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
QUANTILES = (0.025, 0.975)

Interval = tuple[float, float]

_CELLS = 4_000_000  # numbers drawn at one time


@dataclass(frozen=True)
class Gain:
    """Accuracies in percent and their difference in points, each with its 95% interval."""

    solo: float
    pair: float
    gain: float
    solo_ci95: Interval
    pair_ci95: Interval
    gain_ci95: Interval


def bootstrap_gain(
    pair: NDArray[np.bool_], solo: NDArray[np.bool_], *, same_seeds: bool, resamples: int = RESAMPLES, seed: int = 0
) -> Gain:
    """The gain of pair runs over solo runs: which images `[P, M]` and `[S, M]` each of them has right.

    Percentile intervals of a bootstrap in two levels. With several runs, runs are drawn with replacement; then images
    are, and a drawn set of images serves all runs, since all are tested on the same ones. same_seeds: run p of both
    sides has the same seed, so that they are drawn together (P = S).
    """
    if pair.ndim != 2 or solo.ndim != 2 or pair.shape[1] != solo.shape[1] or 0 in pair.shape or 0 in solo.shape:
        raise ValueError(f"expected [P, M] and [S, M], given {pair.shape} and {solo.shape}")
    if same_seeds and len(pair) != len(solo):
        raise ValueError(f"the same seeds, but {len(pair)} and {len(solo)} runs")
    rng = np.random.default_rng(seed)
    accuracies = _resample_images(np.concatenate([pair, solo]), resamples, rng)
    of_pair, of_solo = accuracies[:, : len(pair)], accuracies[:, len(pair) :]
    drawn = _draw_runs(len(pair), resamples, rng)
    pairs = _mean_of(of_pair, drawn)
    solos = _mean_of(of_solo, drawn if same_seeds else _draw_runs(len(solo), resamples, rng))
    return Gain(
        solo=100.0 * float(solo.mean()),
        pair=100.0 * float(pair.mean()),
        gain=100.0 * (float(pair.mean()) - float(solo.mean())),
        solo_ci95=_interval(solos),
        pair_ci95=_interval(pairs),
        gain_ci95=_interval(pairs - solos),
    )


def _resample_images(right: NDArray[np.bool_], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The accuracies `[R, N]` of N runs on images drawn with replacement from `right` `[N, M]`.

    Images that the runs agree upon are alike: how often each kind is drawn is multinomial, and a few kinds replace
    many images.
    """
    kinds, counts = np.unique(right, axis=1, return_counts=True)  # [N, kinds]
    images = right.shape[1]
    parts = []
    step = max(1, _CELLS // len(counts))
    for start in range(0, resamples, step):
        drawn = rng.multinomial(images, counts / images, size=min(step, resamples - start))
        parts.append(drawn @ kinds.T.astype(np.float64) / images)
    return np.concatenate(parts)


def _draw_runs(runs: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.integers(runs, size=(resamples, runs))


def _mean_of(accuracies: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.take_along_axis(accuracies, drawn, axis=1).mean(axis=1)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(100.0 * values, QUANTILES)
    return float(low), float(high)
