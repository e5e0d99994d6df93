"""The two heads of a network: MLP head over the pooled feature, T-Head over the dense ones.

Shape letters: B rows, N tokens, d width of the T-Head, C width before the prototypes, K prototypes. `scale` is that of
`Prototypes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mokd.config import MlpHeadConfig, THeadConfig
from mokd.losses.kernels.targets import at_least_fp32
from mokd.losses.prototypes import Prototypes
from mokd.models import positions
from mokd.models.backbones import BackboneShapes, Features


def init_linear(module: nn.Module) -> None:
    """Linear layers: weights truncated-normal with std 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(widths: Sequence[int], *, batch_norm: bool = False) -> nn.Sequential:
    """Linear layers from each width to the next, with GELU between, on request with BatchNorm before it."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        if i:
            if batch_norm:
                layers.append(nn.BatchNorm1d(widths[i]))
            layers.append(nn.GELU())
        layers.append(nn.Linear(widths[i], widths[i + 1]))
    return nn.Sequential(*layers).apply(init_linear)


def unit_vectors(x: Tensor) -> Tensor:
    """`x` with its last dimension L2-normalised, in fp32 or better."""
    return F.normalize(at_least_fp32(x), dim=-1)


class MlpHead(nn.Module):
    """Linear layers with GELU between, L2 normalisation; the prototypes come after, in `last_layer`."""

    def __init__(self, config: MlpHeadConfig, width: int, prototypes: int, scale: float = 1.0) -> None:
        super().__init__()
        widths = [width] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
        self.mlp = mlp(widths, batch_norm=config.batch_norm)
        self.last_layer = Prototypes(config.bottleneck, prototypes, train_gain=config.train_gain, scale=scale)

    def forward(self, pooled: Tensor) -> Tensor:
        """Unit vectors `[B, C]` for pooled features `[B, D]`."""
        return unit_vectors(self.mlp(pooled))


class THead(nn.Module):
    """Transformer blocks over the dense features, optionally with another branch's query among them."""

    def __init__(
        self, config: THeadConfig, shapes: BackboneShapes, global_px: int, prototypes: int, scale: float = 1.0
    ) -> None:
        super().__init__()
        d = config.width
        # a transformer whose tokens have the right width already is taken as it is
        as_is = shapes.is_sequence and shapes.width == d
        # otherwise a 1x1 convolution, whose default first weights it keeps: uniform in +-1/sqrt(width)
        self.project = nn.Identity() if as_is else nn.Linear(shapes.width, d)
        self.grid = shapes.grids[global_px]
        self.position = nn.Parameter(torch.empty(1, d, self.grid, self.grid))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(d, config.heads, mlp_ratio=config.mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(config.depth)
        )
        self.norm = norm(d)
        self.last_layer = Prototypes(d, prototypes, train_gain=True, gain=config.gain, scale=scale)
        self.blocks.apply(init_linear)
        nn.init.trunc_normal_(self.position, std=0.02)

    def embed(self, features: Features) -> tuple[Tensor, Tensor]:
        """Tokens with their position embeddings `[B, N, d]`, and the query token `[B, d]` for other branches.

        The query is the class token, or the mean of the projected map where there is none; it is detached.
        """
        tokens = self.project(features.tokens)
        query = tokens.mean(dim=1) if features.cls is None else self.project(features.cls)
        return tokens + self._positions(features.grid), query.detach()

    def forward(self, tokens: Tensor, query: Tensor | None = None) -> Tensor:
        """The mean over patch tokens `[B, d]` after the blocks; a query `[B, d]` takes part and is dropped."""
        if query is not None:
            tokens = torch.cat([query.unsqueeze(1).to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return (tokens if query is None else tokens[:, 1:]).mean(dim=1)

    def _positions(self, grid: int) -> Tensor:
        return positions.resample(self.position[0].permute(1, 2, 0), grid, grid).flatten(0, 1)
