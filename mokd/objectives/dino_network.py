"""One network: backbone, MLP head, T-Head. A branch has two of them, the student and the teacher.

Outputs are named tuples because DDP must find the tensors inside them.

Shape letters: V views, B images per rank, N tokens, d width of the T-Head, C width before prototypes, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mokd.losses.prototypes import HeadOutput
from mokd.models.backbones import Backbone
from mokd.models.blocks import repeated_blocks
from mokd.models.heads import MlpHead, THead
from mokd.models.trainable import TrainableNetwork, Units


class NetworkOutput(NamedTuple):
    """What a network says of a batch of views.

    mlp, t_head: head outputs over all views given; queries `[V, B, d]`: the detached query token of every view;
    tokens: the embedded tokens `[B, N, d]` of the first view, for other branches to search;
    pooled: the pooled features `[V, B, D]` of the first group of views.
    """

    mlp: HeadOutput
    t_head: HeadOutput
    queries: Tensor
    tokens: Tensor
    pooled: Tensor


class Network(TrainableNetwork):
    """Backbone, MLP head and T-Head of one branch."""

    def __init__(self, backbone: Backbone, mlp_head: MlpHead, t_head: THead) -> None:
        super().__init__()
        self.backbone = backbone
        self.mlp_head = mlp_head
        self.t_head = t_head

    def forward(self, views: Sequence[Tensor]) -> NetworkOutput:
        """All heads over groups of views, each `[V_g, B, 3, S_g, S_g]`; one backbone pass per group."""
        batch = views[0].shape[1]
        pooled, dense, queries = [], [], []
        searched = None
        calls = self.calls(len(views), self, views[0].device)
        for group, call in zip(views, calls, strict=True):
            with call:
                features = self.backbone(group.flatten(0, 1))
                tokens, query = self.t_head.embed(features)
                searched = tokens[:batch] if searched is None else searched
                pooled.append(features.pooled)
                dense.append(self.t_head(tokens))
                queries.append(query)
        assert searched is not None
        by_view = (-1, batch)
        with calls[0]:
            mlp = self.mlp_head(torch.cat(pooled))
        return NetworkOutput(
            mlp=HeadOutput(mlp.unflatten(0, by_view), self.mlp_head.last_layer()),
            t_head=HeadOutput(torch.cat(dense).unflatten(0, by_view), self.t_head.last_layer()),
            queries=torch.cat(queries).unflatten(0, by_view),
            tokens=searched,
            pooled=pooled[0].unflatten(0, by_view),
        )

    def units(self) -> Units:
        """Every block, the MLP, and the prototypes of each head."""
        blocks = [*repeated_blocks(self.backbone), *self.t_head.blocks, self.mlp_head.mlp]
        return Units(blocks, exact=[self.mlp_head.last_layer, self.t_head.last_layer])

    def is_last_layer(self, parameter: str) -> bool:
        """Whether a parameter belongs to the prototypes of either head."""
        return ".last_layer." in parameter

    def in_t_head(self, parameter: str) -> bool:
        """Whether a parameter belongs to the T-Head, its prototypes included."""
        return parameter.startswith("t_head.")

    def search(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """Rows `[V, B, d]` found by queries `[V, B, d]` of another branch in this network's tokens `[B, N, d]`.

        Each view searches the same map, one query at a time (cross-attention feature search).
        """
        views, batch = queries.shape[:2]
        repeated = tokens.unsqueeze(0).expand(views, *tokens.shape).flatten(0, 1)
        (call,) = self.calls(1, self.t_head, tokens.device)
        with call:
            return self.t_head(repeated, queries.flatten(0, 1)).unflatten(0, (views, batch))
