"""The network of a branch that distils frozen ones: a backbone, and a projector into the features of each of them.

Shape letters: V views, B images per rank, D width of a frozen branch's features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from mokd.config import ProjectionConfig
from mokd.models.backbones import Backbone
from mokd.models.blocks import repeated_blocks
from mokd.models.heads import mlp
from mokd.models.trainable import TrainableNetwork, Units


class DistillationOutput(NamedTuple):
    """What a network says of views: `pooled` `[V, B, C]`, and for every frozen branch `projected` `[V, B, D]`.

    A named tuple because DDP must find the tensors inside it.
    """

    pooled: Tensor
    projected: tuple[Tensor, ...]


class DistillationNetwork(TrainableNetwork):
    """Backbone and projectors, by the names of the frozen branches; a frozen branch has no projector."""

    sees_batches = False

    def __init__(self, backbone: Backbone, width: int, targets: Mapping[str, int], config: ProjectionConfig) -> None:
        """width: of the pooled feature; targets: the widths of the frozen branches' features."""
        super().__init__()
        self.backbone = backbone
        hidden = [config.hidden] * (config.layers - 1)
        self.projectors = nn.ModuleDict({name: mlp([width, *hidden, target]) for name, target in targets.items()})

    def units(self) -> Units:
        """Every block and every projector."""
        return Units([*repeated_blocks(self.backbone), *self.projectors.values()], exact=[])

    def forward(self, crops: Tensor) -> DistillationOutput:
        """Everything over views `[V, B, 3, S, S]`."""
        by_view = crops.shape[:2]
        pooled = self.backbone(crops.flatten(0, 1)).pooled
        projected = tuple(projector(pooled).unflatten(0, by_view) for projector in self.projectors.values())
        return DistillationOutput(pooled.unflatten(0, by_view), projected)
