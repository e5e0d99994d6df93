"""The bootstrap intervals against closed forms and a slow loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mokd.comparison.bootstrap import bootstrap_gain

IMAGES = 10_000


def answers(rng: np.random.Generator, accuracy: float, agreement: float, images: int) -> tuple[np.ndarray, np.ndarray]:
    """A solo and a pair run with a gain of 3 points, which share `agreement` of their answers."""
    solo = rng.random(images) < accuracy
    pair = np.where(rng.random(images) < agreement, solo, rng.random(images) < accuracy + 0.03)
    return pair[None], solo[None]


@pytest.mark.parametrize("agreement", [0.0, 0.8])
def test_one_seed_gives_the_binomial_intervals(agreement: float) -> None:
    pair, solo = answers(np.random.default_rng(1), 0.6, agreement, IMAGES)
    found = bootstrap_gain(pair, solo, same_seeds=True)
    p, s = pair.mean(), solo.mean()
    gained, lost = (pair & ~solo).mean(), (~pair & solo).mean()
    expected = {
        "solo": (s, s * (1 - s)),
        "pair": (p, p * (1 - p)),
        # the paired difference is 1, -1 or 0 for every image
        "gain": (gained - lost, gained + lost - (gained - lost) ** 2),
    }
    for name, (mean, variance) in expected.items():
        error = 100.0 * math.sqrt(variance / IMAGES)
        low, high = getattr(found, f"{name}_ci95")
        assert getattr(found, name) == pytest.approx(100.0 * mean)
        # 10,000 resamples know a quantile to 1.5% of the interval's half
        assert low == pytest.approx(100.0 * mean - 1.96 * error, abs=0.1 * error)
        assert high == pytest.approx(100.0 * mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for n in range(300):
        pair, solo = answers(rng, 0.5, 0.5, 400)
        low, high = bootstrap_gain(pair, solo, same_seeds=True, resamples=800, seed=n).gain_ci95
        inside += low <= 100 * 0.5 * 0.03 <= high
    assert 0.91 < inside / 300 < 0.985  # three standard deviations around 95%


def literal(pair: np.ndarray, solo: np.ndarray, same_seeds: bool, resamples: int) -> np.ndarray:
    """Draws seeds, then images, one number at a time."""
    rng = np.random.default_rng(9)
    gains = []
    for _ in range(resamples):
        pairs = rng.integers(len(pair), size=len(pair))
        solos = pairs if same_seeds else rng.integers(len(solo), size=len(solo))
        images = rng.integers(pair.shape[1], size=pair.shape[1])
        gains.append(100.0 * (pair[pairs][:, images].mean() - solo[solos][:, images].mean()))
    return np.array(gains)


@pytest.mark.parametrize(("same_seeds", "runs"), [(True, (4, 4)), (False, (4, 4)), (False, (3, 5))])
def test_seeds_then_images_as_in_the_loop(same_seeds: bool, runs: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    luck = rng.normal(0.0, 0.05, size=(max(runs), 1))  # of a seed, on both sides
    pair = rng.random((runs[0], 300)) < 0.6 + luck[: runs[0]]
    solo = rng.random((runs[1], 300)) < 0.5 + luck[: runs[1]]
    found = bootstrap_gain(pair, solo, same_seeds=same_seeds)
    gains = literal(pair, solo, same_seeds, 4000)
    low, high = np.quantile(gains, [0.025, 0.975])
    assert found.gain == pytest.approx(100.0 * (pair.mean() - solo.mean()))
    assert found.gain_ci95 == pytest.approx((low, high), abs=0.12 * gains.std())


def test_seeds_that_agree_add_nothing_and_seeds_that_differ_widen_it() -> None:
    rng = np.random.default_rng(4)
    pair, solo = answers(rng, 0.6, 0.5, 2000)

    def width(pair: np.ndarray, solo: np.ndarray, same_seeds: bool = True) -> float:
        low, high = bootstrap_gain(pair, solo, same_seeds=same_seeds).gain_ci95
        return high - low

    alone = width(pair, solo)
    assert width(pair.repeat(3, axis=0), solo.repeat(3, axis=0)) == pytest.approx(alone, rel=0.05)
    lucky = np.concatenate([pair, pair | (rng.random(2000) < 0.2), pair & (rng.random(2000) < 0.8)])
    assert width(lucky, solo.repeat(3, axis=0)) > 2 * alone
    # luck that a seed brings to both sides cancels where runs are drawn together
    both = np.concatenate([solo, solo | (rng.random(2000) < 0.3), solo & (rng.random(2000) < 0.7)])
    assert width(both, both) == 0.0
    assert width(both, both, same_seeds=False) > 2 * alone


def test_the_same_seed_gives_the_same_interval() -> None:
    pair, solo = (np.random.default_rng(n).random((5, 700)) < 0.6 for n in (5, 6))
    first, again, other = (bootstrap_gain(pair, solo, same_seeds=True, seed=n) for n in (0, 0, 1))
    assert first == again
    assert first.gain_ci95 != other.gain_ci95


@pytest.mark.parametrize(
    ("pair", "solo", "same_seeds"), [((2, 9), (3, 9), True), ((1, 9), (1, 8), True), ((1, 0), (1, 0), False)]
)
def test_shapes_that_do_not_go_together_are_refused(pair: tuple, solo: tuple, same_seeds: bool) -> None:
    with pytest.raises(ValueError, match=r"expected|same seeds"):
        bootstrap_gain(np.zeros(pair, bool), np.zeros(solo, bool), same_seeds=same_seeds)
