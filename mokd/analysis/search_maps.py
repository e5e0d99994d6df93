"""Cross-attention search maps: where a local crop's query of one branch looks in the global map of another.

Shape letters: L crops of an image, B images, G x G the grid of the searched map, N = G * G, d width of the T-Head, D
width of contrastive keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mokd.analysis.layers import attention_read
from mokd.checkpointing import state
from mokd.checkpointing.reading import Checkpoint
from mokd.config import RunConfig
from mokd.models.trainable import TrainableNetwork
from mokd.objectives.base import build_objective
from mokd.objectives.contrastive_network import ContrastiveNetwork
from mokd.objectives.dino_network import Network


class Search(NamedTuple):
    """Weights over the positions of a map, each `[L, B, G, G]` with sum 1.

    looks: what the query attends to. takes: how much the positions attend to the query, which is what changes the
    result of the search: the query's own output is dropped. None where there is no such attention.
    """

    looks: Tensor
    takes: Tensor | None


def whole_network(found: Checkpoint, config: RunConfig, branch: str, network: str) -> TrainableNetwork:
    """A branch's student or teacher with its heads, in evaluation mode, from a checkpoint."""
    (chosen,) = (b for b in config.branches if b.name == branch)
    with torch.random.fork_rng():
        objective = build_objective(config, torch.device("cpu"))
        whole = objective.build_network(chosen, 1, student=network == "student")
    whole.load_state_dict(state.network_tensors(found, branch, network))
    return whole.eval().requires_grad_(False)


def crop_boxes(config: RunConfig, image_px: int, crops: int, image: int) -> list[tuple[int, int, int]]:
    """Left, top and side in pixels of `crops` square crops of an image: of the middle of the local crops' areas (of the
    global ones' smaller half, where a run has no local crops), at places that follow from the run's seed.
    """
    local = config.views.local_crops
    low, high = local.area_scale if local.count else (0.05, config.views.global_crops.area_scale[0])
    side = max(1, round(image_px * (0.5 * (low + high)) ** 0.5))
    generator = np.random.default_rng([config.seed, image])
    corners = generator.integers(0, max(1, image_px - side + 1), size=(crops, 2)).tolist()
    return [(left, top, side) for left, top in corners]


def cut(images: Tensor, boxes: list[list[tuple[int, int, int]]], size_px: int) -> Tensor:
    """Crops `[L, B, 3, s, s]` of images `[B, 3, S, S]`; `boxes` of every image, resized to `size_px` (bicubic)."""
    views = []
    for image, places in zip(images, boxes, strict=True):
        parts = [image[None, :, top : top + side, left : left + side] for left, top, side in places]
        size = (size_px, size_px)
        resized = [F.interpolate(p, size, mode="bicubic", align_corners=False, antialias=True) for p in parts]
        views.append(torch.cat(resized))
    return torch.stack(views, dim=1)


@torch.no_grad()
def search_maps(searcher: TrainableNetwork, searched: TrainableNetwork, images: Tensor, crops: Tensor) -> Search:
    """Maps for every crop `[L, B, 3, s, s]` by one branch's student in images `[B, 3, S, S]` by another's teacher.

    With the DINO objective these are the weights of the first block of the searched T-Head, where the query still is
    the crop's and nothing else, averaged over heads; `looks` leaves out what the query gives to itself, `takes` is
    scaled to sum 1. With the contrastive objective they are the weights of the feature matching.
    """
    if isinstance(searcher, ContrastiveNetwork) and isinstance(searched, ContrastiveNetwork):
        return Search(_matching(searcher, searched, images, crops), None)
    assert isinstance(searcher, Network)
    assert isinstance(searched, Network)
    tokens, _ = searched.t_head.embed(searched.backbone(images))
    _, queries = searcher.t_head.embed(searcher.backbone(crops.flatten(0, 1)))
    read: list[Tensor] = []
    with attention_read(searched.t_head.blocks[0], lambda _, weights: read.append(weights)):
        searched.search(tokens, queries.unflatten(0, crops.shape[:2]))
    weights = read[0].float().mean(dim=1)  # [L * B, 1 + N, 1 + N], the query first
    return Search(_placed(weights[:, 0, 1:], crops), _placed(weights[:, 1:, 0], crops))


def _matching(searcher: ContrastiveNetwork, searched: ContrastiveNetwork, images: Tensor, crops: Tensor) -> Tensor:
    assert searcher.matching is not None
    queries = searcher(crops).projected.flatten(0, 1)
    dense = searched(images.unsqueeze(0), dense=True).dense[0]
    repeated = dense.expand(crops.shape[0], *dense.shape).flatten(0, 1)
    _, weights = searcher.matching.match(queries, repeated)
    return _placed(weights.float(), crops)


def _placed(rows: Tensor, crops: Tensor) -> Tensor:
    """`[L * B, N]` as `[L, B, G, G]` with sum 1."""
    side = math.isqrt(rows.shape[-1])
    return (rows / rows.sum(dim=-1, keepdim=True)).reshape(*crops.shape[:2], side, side)
