"""Dense features as colors: the first three principal components of the tokens of some images.

Oquab et al., "DINOv2" (2023), figure 1. Shape letters: B images, N tokens, G x G their grid, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokd.analysis.layers import square_side


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows `[R, D]` along their first principal axes, `[R, count]`, and the share of the variance of each.

    The largest entry of every axis is positive, so that the same rows give the same signs everywhere.
    """
    centered = rows.double() - rows.double().mean(dim=0)
    variances, axes = torch.linalg.eigh(centered.T @ centered)
    axes = axes.flip(1)[:, :count]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return centered @ (axes * largest.sign()), variances.flip(0)[:count] / variances.sum().clamp_min(1e-30)


def color_maps(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[B, N, D]` as colors `[B, G, G, 3]` in 0 to 1, and the three components' shares of the variance.

    The components are those of all tokens of all images, so that colors mean the same in each; a color's range is that
    of its component from the 1st to the 99th percentile.
    """
    batch, count, _ = tokens.shape
    grid = square_side(count)
    assert grid is not None, "tokens form a square grid"
    projected, shares = principal_components(tokens.flatten(0, 1), 3)
    low, high = torch.quantile(projected, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)
    return scaled.view(batch, grid, grid, 3).float(), shares
