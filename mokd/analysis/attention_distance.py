"""Mean attention distance: how far apart, in pixels, the places are between which an attention head moves information.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), figure 7; Raghu et al. (2021), section 3.

Shape letters: B images, h heads, N tokens, P of them class or register tokens, G x G the grid of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokd.analysis.layers import attention_read, square_side
from mokd.models.backbones import Backbone


def attention_distance(weights: Tensor, prefix_tokens: int, image_px: int) -> Tensor:
    """Distances `[B, h]` in pixels of attention weights `[B, h, N, N]` on images of `image_px` a side.

    For a query at patch q: `sum_k w_qk |c_q - c_k|` over patches k, with c the patches' centers and w the weights
    normalized to sum 1 over patches: what goes to class and register tokens has no place in the image, and neither have
    they as queries. Averaged over all queries q.
    """
    between = weights[:, :, prefix_tokens:, prefix_tokens:].float()
    grid = square_side(between.shape[-1])
    assert grid is not None, "patch tokens form a square grid"
    between = between / between.sum(dim=-1, keepdim=True)
    steps = torch.arange(grid, device=weights.device, dtype=torch.float32) * (image_px / grid)
    centers = torch.cartesian_prod(steps, steps)
    distances = (centers[:, None] - centers[None]).norm(dim=-1)
    return (between * distances).sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def attention_distances(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Distances `[B, h]` of every attention over whole maps, by its name in timm's network; empty for a CNN.

    An attention within windows (Swin) sees no more than its window and is left out.
    """
    found: dict[str, Tensor] = {}

    def read(name: str, weights: Tensor) -> None:
        batch, _, queries, keys = weights.shape
        if batch == len(images) and queries == keys and square_side(keys - backbone.prefix_tokens):
            found[name] = attention_distance(weights, backbone.prefix_tokens, images.shape[-1])

    with attention_read(backbone.net, read):
        backbone(images)
    return found
