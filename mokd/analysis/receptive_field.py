"""Effective receptive fields: from how far, in pixels, a block's output at one place draws what it says.

The equivalent of attention distance for networks without attention, and comparable between a CNN and a transformer.
After Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (2016).

Shape letters: B images, S side in pixels, H x W grid of a map, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokd.analysis.layers import captured_maps
from mokd.models.backbones import Backbone


def effective_field(output: Tensor, images: Tensor, rows: Tensor, columns: Tensor, signs: Tensor) -> Tensor:
    """What each pixel weighs, `[B, S, S]` with sum 1 (0 where nothing has any weight), in a map `[B, H, W, C]`.

    For image b: `w(x) ~ sum over colors |d(signs_b . output[b, row_b, column_b]) / dx|`, the gradient of the output
    at one place towards the image. signs `[B, C]` of +-1 keep channels from cancelling in a systematic way. `images`
    `[B, 3, S, S]` require a gradient, and `output` follows from them.
    """
    at = torch.arange(len(images), device=images.device)
    answer = (output[at, rows, columns] * signs).sum()
    (gradient,) = torch.autograd.grad(answer, images, retain_graph=True)
    weights = gradient.abs().sum(dim=1)
    return weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-30)


def field_distance(weights: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B]`: the mean distance in pixels, under weights `[B, S, S]`, from the center of a map's cell; NaN without any.

    Cell (r, c) of a map of H x W covers the pixels of `[r, r + 1) * S / H` by `[c, c + 1) * S / W`.
    """
    side = weights.shape[-1]
    pixels = torch.arange(side, device=weights.device, dtype=torch.float32) + 0.5
    down = pixels - ((rows + 0.5) * side / grid[0])[:, None]
    right = pixels - ((columns + 0.5) * side / grid[1])[:, None]
    distances = (down[:, :, None].square() + right[:, None, :].square()).sqrt()
    total = weights.sum(dim=(1, 2))
    return torch.where(total > 0, (weights * distances).sum(dim=(1, 2)) / total, torch.nan)


def field_distances(backbone: Backbone, images: Tensor, draws: int, seed: int) -> dict[str, Tensor]:
    """Distances `[draws, B]` of every block, by its name: for each draw and image one place of the map, all equally
    likely, and one choice of signs, functions of `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    images, maps = _traced(backbone, images)
    for name, output in maps.items():
        _, height, width, channels = output.shape
        for _ in range(draws):
            rows = torch.randint(height, (len(images),), generator=generator).to(images.device)
            columns = torch.randint(width, (len(images),), generator=generator).to(images.device)
            signs = _signs(len(images), channels, generator, images.device)
            weights = effective_field(output, images, rows, columns, signs)
            found.setdefault(name, []).append(field_distance(weights, rows, columns, (height, width)))
    return {name: torch.stack(parts) for name, parts in found.items()}


def central_fields(backbone: Backbone, images: Tensor, names: list[str], seed: int) -> dict[str, tuple[Tensor, float]]:
    """Of some blocks' central cells, the mean `[S, S]` over images of the fields, each with sum 1, and where the cell's
    center lies, in pixels from the top and from the left.
    """
    generator = torch.Generator().manual_seed(seed)
    images, maps = _traced(backbone, images)
    fields = {}
    for name in names:
        _, side, _, channels = maps[name].shape
        at = torch.full((len(images),), side // 2, device=images.device)
        signs = _signs(len(images), channels, generator, images.device)
        field = effective_field(maps[name], images, at, at, signs).mean(dim=0)
        fields[name] = (field, (side // 2 + 0.5) * images.shape[-1] / side)
    return fields


def half_weight_radius(weights: Tensor, center: float) -> float:
    """The radius in pixels around `center`, from the top and from the left, within which half of `[S, S]` lies."""
    offsets = torch.arange(weights.shape[-1]) + 0.5 - center
    radii, order = (offsets[:, None].square() + offsets[None].square()).sqrt().flatten().sort(stable=True)
    inside = weights.flatten()[order].double().cumsum(0)
    return float(radii[int((inside < 0.5 * inside[-1]).sum())])


def _traced(backbone: Backbone, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Images that require a gradient, and every block's map of them; the weights require none."""
    backbone.requires_grad_(False)
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad(), captured_maps(backbone) as maps:
        backbone(images)
    return images, dict(maps)


def _signs(images: int, channels: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.randint(2, (images, channels), generator=generator) * 2 - 1).to(device, torch.float32)
