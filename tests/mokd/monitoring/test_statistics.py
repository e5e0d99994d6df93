"""Measures against cases computed by hand, and against their definitions written as loops."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from mokd.monitoring.statistics import divergence, effective_rank, linear_cka, relative_change


def test_effective_rank_of_hand_computed_cases() -> None:
    assert effective_rank(np.eye(7)) == pytest.approx(7.0)
    assert effective_rank(np.ones((5, 5))) == pytest.approx(1.0, abs=1e-6)
    # singular values 3 and 1: weights 3/4 and 1/4
    features = np.zeros((4, 2))
    features[0, 0], features[1, 1] = 3.0, 1.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(features @ features.T) == pytest.approx(math.exp(entropy))


def test_effective_rank_is_that_of_the_singular_values() -> None:
    features = np.random.default_rng(0).normal(size=(20, 8))
    singular = np.linalg.svd(features, compute_uv=False)
    weights = singular / singular.sum()
    # the square roots of products' rounding errors stand for the twelve singular values that are zero
    assert effective_rank(features @ features.T) == pytest.approx(np.exp(-(weights * np.log(weights)).sum()), rel=1e-4)


def hsic(a: np.ndarray, b: np.ndarray) -> float:
    """Its definition: the mean over all quadruples of different images."""
    terms = [a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q]) for i, j, q, r in permutations(range(len(a)), 4)]
    return float(np.mean(terms))


def test_cka_is_the_mean_over_quadruples_of_images() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(6, 3)), random.normal(size=(6, 5))
    y[:, :3] += x
    a, b = x @ x.T, y @ y.T
    assert linear_cka(a, b) == pytest.approx(hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b)))


def test_cka_does_not_see_rotation_and_size_and_sees_nothing_in_noise() -> None:
    random = np.random.default_rng(2)
    x, noise = random.normal(size=(200, 16)), random.normal(size=(200, 64))
    rotation, _ = np.linalg.qr(random.normal(size=(16, 16)))
    turned = 3.0 * x @ rotation
    assert linear_cka(x @ x.T, turned @ turned.T) == pytest.approx(1.0)
    assert abs(linear_cka(x @ x.T, noise @ noise.T)) < 0.03
    assert math.isnan(linear_cka(np.eye(3), np.eye(3)))
    assert math.isnan(linear_cka(np.ones((8, 8)), x[:8] @ x[:8].T))


def test_divergence_and_change() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(divergence(p, q), torch.tensor([expected, 0.0], dtype=torch.float64))
    assert divergence(p * 1.001, p)[0].item() == pytest.approx(0.0, abs=1e-12)
    now, before = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert relative_change(now, before).tolist() == [1.0, 0.0]
