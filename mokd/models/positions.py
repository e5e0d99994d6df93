"""Learned position embeddings on another grid than their own: one way for the T-Head and for transformers from timm.

Shape letters: G x G the embeddings' own grid, H x W the one that is wanted, d width.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TIMM_RESAMPLING = "resample_abs_pos_embed"


def resample(positions: Tensor, height: int, width: int) -> Tensor:
    """`[G, G, d]` as `[H, W, d]`: bicubic, corners not aligned, not antialiased, at a scale of `(H + 0.1) / G`.

    That is the reference implementation's scale, which came from DINO: the tenth kept the output size from being
    rounded down, and it shifts the samples a little. Products with constant matrices, in double precision: their
    backward pass adds up in a fixed order, where that of torch's own interpolation is left to chance on GPUs, and
    neither autocast nor TensorFloat-32 rounds them.
    """
    old_height, old_width, _ = positions.shape
    if (old_height, old_width) == (height, width):
        return positions
    vertical = _matrix(old_height, height, positions.device)
    horizontal = _matrix(old_width, width, positions.device)
    rows = torch.tensordot(vertical, positions.double(), dims=1)  # [H, G, d]
    return torch.matmul(horizontal, rows).to(positions.dtype)


@torch.compiler.assume_constant_result
def _matrix(old: int, new: int, device: torch.device) -> Tensor:
    return _known_matrix(old, new, device)  # the compiler would trace through the cache, if it saw it


@lru_cache(maxsize=256)
def _known_matrix(old: int, new: int, device: torch.device) -> Tensor:
    """`[new, old]`, what `old` values are multiplied with to resample them: torch's interpolation, read off."""
    basis = torch.eye(old, dtype=torch.float64, device="cpu").view(1, old, old, 1).expand(1, old, old, 2)
    scale = ((new + 0.1) / old, 1.0)
    columns = F.interpolate(basis, scale_factor=scale, mode="bicubic", align_corners=False)  # [1, old, new, 2]
    return columns[0, :, :, 0].T.contiguous().to(device)


def use_in(net: nn.Module) -> None:
    """Makes a timm transformer resample its position embeddings by `resample`; other networks stay as they are.

    timm has the resampling (antialiased, to the exact size) built into `_pos_embed`. The network gets a copy of that
    method which finds ours under the name of timm's function; nobody else's networks are changed.
    """
    method = getattr(type(net), "_pos_embed", None)
    if method is None or _TIMM_RESAMPLING not in method.__code__.co_names:
        return
    known = {**method.__globals__, _TIMM_RESAMPLING: _instead_of_timms}
    ours = types.FunctionType(method.__code__, known, method.__name__, method.__defaults__, method.__closure__)
    net._pos_embed = types.MethodType(ours, net)  # type: ignore[assignment]


def _instead_of_timms(
    posemb: Tensor, new_size: Sequence[int], old_size: Sequence[int], num_prefix_tokens: int = 1, **_: Any
) -> Tensor:
    """Embeddings `[1, prefix + G * G, d]` as `[1, prefix + H * W, d]`, the prefix as it is; timm's signature."""
    prefix, positions = posemb[:, :num_prefix_tokens], posemb[0, num_prefix_tokens:]
    resampled = resample(positions.unflatten(0, tuple(old_size)), *new_size)
    return torch.cat([prefix, resampled.flatten(0, 1).unsqueeze(0)], dim=1)
