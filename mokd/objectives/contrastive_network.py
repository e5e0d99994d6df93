"""The network of a branch in the contrastive objective: backbone, projection, and what it learns from others with.

Outputs are named tuples because DDP must find the tensors inside them.

Shape letters: V views, B images per rank, N tokens, D width of queries and keys, R rows = V * B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mokd.config import ContrastiveConfig
from mokd.models.backbones import Backbone, BackboneShapes
from mokd.models.blocks import repeated_blocks
from mokd.models.heads import mlp, unit_vectors
from mokd.models.trainable import TrainableNetwork, Units


class Seen(NamedTuple):
    """What a teacher says of views: unit vectors `projected` `[V, B, D]` and, in company, `dense` `[V, B, N, D]`."""

    projected: Tensor
    dense: Tensor | None


class ContrastiveOutput(NamedTuple):
    """What a network says of views.

    projected: unit vectors `[V, B, D]`; dense: unit vectors `[V, B, N, D]` where asked for;
    aligned: for every other branch the keys `[V, B, D]` for this branch's queries; pooled: the backbone's `[V, B, C]`.
    """

    projected: Tensor
    dense: Tensor | None
    aligned: tuple[Tensor, ...]
    pooled: Tensor


class FeatureMatching(nn.Module):
    """Extraction, matching and alignment: what a branch makes of another teacher's features of an image.

    Without biases: a bias would be a part of the key that is the same for all images.
    """

    def __init__(self, width: int, residual_weight: float) -> None:
        super().__init__()
        self.extraction = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.alignment = nn.Linear(width, width, bias=False)
        self.residual_weight = residual_weight

    def forward(self, queries: Tensor, dense: Tensor, projected: Tensor) -> Tensor:
        """Keys `[R, D]` for own queries `[R, D]`, from the other's maps `[R, N, D]` and projections `[R, D]`.

        The query only chooses positions here: it is detached, as the query of the cross-attention search is.
        """
        extracted, weights = self.match(queries, dense)
        matched = (weights.unsqueeze(-1) * extracted).sum(dim=1)
        return unit_vectors(self.alignment(matched) + self.residual_weight * projected)

    def match(self, queries: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """What is extracted from the other's maps `[R, N, D]`, and how own queries weigh its positions `[R, N]`."""
        grid = math.isqrt(dense.shape[1])
        maps = dense.transpose(1, 2).unflatten(2, (grid, grid))
        extracted = self.extraction(maps).flatten(2).transpose(1, 2)
        similarity = (unit_vectors(extracted) * queries.detach().unsqueeze(1)).sum(dim=-1)
        return extracted, similarity.softmax(dim=-1)


class ContrastiveNetwork(TrainableNetwork):
    """Backbone, projection and, in company, feature matching.

    One projection serves the pooled feature and every position of the dense ones: a projection of the dense features
    by itself would be trained by nothing, since other branches send no gradient into it.
    """

    def __init__(self, backbone: Backbone, shapes: BackboneShapes, config: ContrastiveConfig, *, alone: bool) -> None:
        super().__init__()
        self.backbone = backbone
        hidden = [config.projection.hidden] * (config.projection.layers - 1)
        self.projection = mlp([shapes.width, *hidden, config.width])
        # a few networks widen the feature after pooling: then the mean over tokens is what is projected
        self.projects_mean = shapes.pooled_width != shapes.width
        self.matching = None if alone else FeatureMatching(config.width, config.residual_weight)

    def units(self) -> Units:
        """Every block, the projection, and the matching."""
        rest = [self.projection] if self.matching is None else [self.projection, self.matching]
        return Units([*repeated_blocks(self.backbone), *rest], exact=[])

    def forward(self, crops: Tensor, *, dense: bool = False, others: Sequence[Seen] = ()) -> ContrastiveOutput:
        """Everything over views `[V, B, 3, S, S]`; `others` saw the same views, and each is met in the other view."""
        by_view = crops.shape[:2]
        features = self.backbone(crops.flatten(0, 1))
        feature = features.tokens.mean(dim=1) if self.projects_mean else features.pooled
        queries = unit_vectors(self.projection(feature))
        aligned = []
        for other in others:
            assert self.matching is not None, "a branch alone has nobody to learn from"
            assert other.dense is not None
            keys = self.matching(queries, other.dense.flip(0).flatten(0, 1), other.projected.flip(0).flatten(0, 1))
            aligned.append(keys.unflatten(0, by_view))
        return ContrastiveOutput(
            projected=queries.unflatten(0, by_view),
            dense=unit_vectors(self.projection(features.tokens)).unflatten(0, by_view) if dense else None,
            aligned=tuple(aligned),
            pooled=features.pooled.unflatten(0, by_view),
        )
