"""Measures of features and targets, each with its source.

Shape letters: N images, D width, K prototypes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_TINY = 1e-30
_ROUNDING = 1e-10  # what is left of constant features, whose similarity to others is none


def effective_rank(gram: NDArray[np.float64]) -> float:
    """RankMe of features `[N, D]`, from their products `[N, N]`: 1 where all point one way, at most min(N, D).

    The exponential of the entropy of the singular values, normalized to sum 1 (Garrido et al., "RankMe", 2023).
    """
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None))
    weights = singular / max(singular.sum(), _TINY)
    weights = weights[weights > 0.0]
    return float(np.exp(-(weights * np.log(weights)).sum()))


def centered(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The products `[N, N]` of features from which their mean is taken."""
    rows = gram.mean(axis=0)
    return gram - rows - rows[:, None] + rows.mean()


def linear_cka(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Similarity of two networks' features of the same N images, from their products `[N, N]`.

    NaN for N below 4, and where the features of a network are all the same.

    Linear CKA (Kornblith et al., 2019) by the unbiased estimate of HSIC (Song et al., 2012): 1 for features that are
    rotated and scaled versions of each other, about 0 for unrelated ones, however few images there are.
    """
    if len(a) < 4:
        return float("nan")
    a, b = (gram - np.diag(np.diag(gram)) for gram in (a, b))
    own = [_hsic(gram, gram) for gram in (a, b)]
    if any(value <= _ROUNDING * (gram**2).mean() for value, gram in zip(own, (a, b), strict=True)):
        return float("nan")
    return float(_hsic(a, b) / np.sqrt(own[0] * own[1]))


def _hsic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Equation 5 of Song et al., for products without their diagonals."""
    n, rows_a, rows_b = len(a), a.sum(axis=0), b.sum(axis=0)
    cross = (a * b).sum() + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2.0 * rows_a @ rows_b / (n - 2)
    return float(cross / (n * (n - 3)))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q)` in nats over the last dimension, of distributions up to rounding."""
    p, q = (x.double() / x.double().sum(dim=-1, keepdim=True) for x in (p, q))
    return (p * (p.clamp_min(_TINY).log() - q.clamp_min(_TINY).log())).sum(dim=-1)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """`|now - before| / |now|` over the last dimension; 0 where both are 0."""
    now, before = now.double(), before.double()
    return (now - before).norm(dim=-1) / now.norm(dim=-1).clamp_min(_TINY)
