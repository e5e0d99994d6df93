"""Maps over images: attention of transformers, cross-attention search, principal components of dense features."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from mokd.analysis import figures
from mokd.analysis.feature_pca import color_maps
from mokd.analysis.finding import Finding
from mokd.analysis.layers import attention_read, square_side
from mokd.analysis.members import Gathering
from mokd.analysis.search_maps import Search, crop_boxes, cut, search_maps, whole_network
from mokd.checkpointing.hold import open_held
from mokd.config import ContrastiveConfig
from mokd.models.backbones import Backbone

HEADS, CROPS = 6, 2


@torch.no_grad()
def last_attention(backbone: Backbone, images: Tensor) -> Tensor | None:
    """Where the last attention over whole maps looks, `[B, h, G, G]` with sum 1; None for a network without one.

    From the class token where there is one, else the mean over all patches as queries. What goes to class and register
    tokens is left out.
    """
    kept: list[Tensor] = []
    prefix = backbone.prefix_tokens

    def read(_name: str, weights: Tensor) -> None:
        batch, _, queries, keys = weights.shape
        if batch == len(images) and queries == keys and square_side(keys - prefix):
            kept[:] = [weights[:, :, 0] if prefix else weights.mean(dim=2)]

    with attention_read(backbone.net, read):
        backbone(images)
    if not kept:
        return None
    row = kept[0][:, :, prefix:].float()
    side = square_side(row.shape[-1])
    assert side is not None
    return (row / row.sum(dim=-1, keepdim=True)).unflatten(-1, (side, side)).cpu()


def lacks_attention(gathering: Gathering) -> str | None:
    """What is lacking where no network attends over its whole map."""
    one = gathering.pictures[:1]
    if all(last_attention(member.backbone, one) is None for member in gathering.members):
        return "draws the attention of transformers, and there is none"
    return None


def find_attention(gathering: Gathering) -> Iterator[Finding]:
    """Each image with the mean over heads of the last attention, then some heads by themselves."""
    pictures = gathering.drawable(gathering.pictures)
    rows, names, numbers = [], [], {}
    for member in gathering.members:
        found = last_attention(member.backbone, gathering.pictures)
        if found is None:
            continue
        numbers[member.label] = _rounded(found.mean(dim=1))
        for picture, heads in zip(pictures, found, strict=True):
            tiles = [figures.Tile(picture), figures.Tile(picture, heads.mean(dim=0), words="all heads")]
            tiles += [figures.Tile(picture, head, words=f"head {h + 1}") for h, head in enumerate(heads[:HEADS])]
            rows.append(tiles)
            names.append(member.label)
    whose = f"{', '.join(numbers)} over {len(pictures)} images"
    alt = f"Attention in the last block of {whose}: all heads, then single ones."
    samples = gathering.test.ids[gathering.shown].tolist()
    yield Finding("attention", alt, {"samples": samples, "mean_over_heads": numbers}, figures.sheet(rows, names))


def find_pca(gathering: Gathering) -> Iterator[Finding]:
    """Each image with the colors of every network's dense features below it."""
    pictures = gathering.drawable(gathering.pictures)
    rows: list[list[figures.Tile | None]] = [[figures.Tile(picture) for picture in pictures]]
    numbers = {}
    for member in gathering.members:
        with torch.no_grad():
            colors, shares = color_maps(member.backbone(gathering.pictures).tokens.cpu())
        rows.append([figures.Tile(one) for one in colors])
        numbers[member.label] = shares.tolist()
    names = ["image", *numbers]
    said = "; ".join(f"{label} {100 * sum(shares):.0f}%" for label, shares in numbers.items())
    alt = (
        f"The first three principal components of dense features as red, green and blue, for {len(pictures)} images; "
        f"their share of the variance: {said}."
    )
    samples = gathering.test.ids[gathering.shown].tolist()
    yield Finding("pca", alt, {"samples": samples, "variance_shares": numbers}, figures.sheet(rows, names))


def lacks_search(gathering: Gathering) -> str | None:
    """What is lacking where no branch has searched in another."""
    if gathering.job.request.held is None:
        return "needs the heads of a run's networks; a file of weights or an untrained network has none"
    if len(gathering.own) < 2:
        return "needs two branches that learn from each other, and there is one"
    objective = gathering.config.objective
    if isinstance(objective, ContrastiveConfig) and not objective.cross_weight:
        return "draws how branches search in each other, and here cross_weight is 0"
    return None


def find_search(gathering: Gathering) -> Iterator[Finding]:
    """For every ordered pair of branches, each image with some crops, and where their queries look."""
    frozen = {branch.name for branch in gathering.config.branches if branch.frozen}
    for searcher, searched in permutations(gathering.own, 2):
        if searcher.branch not in frozen:  # which learns nothing, and has no student
            yield _search(gathering, searcher.branch, searched.branch)


def _search(gathering: Gathering, searcher: str, searched: str) -> Finding:
    config, images, held = gathering.config, gathering.pictures, gathering.job.request.held
    assert held is not None
    checkpoint = open_held(held)
    boxes = [crop_boxes(config, images.shape[-1], CROPS, row) for row in gathering.shown.tolist()]
    local = config.views.local_crops if config.views.local_crops.count else config.views.global_crops
    found: Search = search_maps(
        whole_network(checkpoint, config, searcher, "student").to(gathering.device),
        whole_network(checkpoint, config, searched, "teacher").to(gathering.device),
        images,
        cut(images, boxes, local.size_px),
    )
    pictures = gathering.drawable(images)
    rows: list[list[figures.Tile]] = []
    inside = []
    for b, picture in enumerate(pictures):
        edges = [(*box, figures.COLORS[c]) for c, box in enumerate(boxes[b])]
        rows.append([figures.Tile(picture, boxes=edges)])
        for c in range(CROPS):
            inside.append(_share_inside(found.looks[c, b], boxes[b][c], images.shape[-1]))
            color = figures.COLORS[c]
            words = f"crop {c + 1} looks"
            rows[-1].append(figures.Tile(picture, found.looks[c, b], [edges[c]], words, color))
            if found.takes is not None:
                rows[-1].append(figures.Tile(picture, found.takes[c, b], [edges[c]], "is taken up", color))
    area = (boxes[0][0][2] / images.shape[-1]) ** 2
    share = sum(inside) / len(inside)
    alt = (
        f"Where local crops' queries by {searcher} (boxes) look in {searched}'s maps of {len(pictures)} images; "
        f"{100 * share:.0f}% of the attention falls into the crop's own box, which is {100 * area:.0f}% of the image."
    )
    numbers = {
        "searcher": f"{searcher} student",
        "searched": f"{searched} teacher",
        "samples": gathering.test.ids[gathering.shown].tolist(),
        "boxes_left_top_side_px": boxes,
        "attention_in_own_box": share,
        "area_of_a_box": area,
        "looks": _rounded(found.looks.transpose(0, 1)),
        "takes": None if found.takes is None else _rounded(found.takes.transpose(0, 1)),
    }
    return Finding(f"search_{searcher}_in_{searched}", alt, numbers, figures.sheet(rows))


def _share_inside(weights: Tensor, box: tuple[int, int, int], image_px: int) -> float:
    """Of weights `[G, G]` with sum 1, each spread evenly over its cell, the part within a box of pixels."""
    grid = weights.shape[-1]
    edges = torch.arange(grid + 1, dtype=torch.float64) * image_px / grid
    left, top, side = box

    def overlap(start: int) -> Tensor:
        shared = edges[1:].clamp(max=start + side) - edges[:-1].clamp(min=start)
        return shared.clamp_min(0.0) * grid / image_px

    return float(overlap(top) @ weights.double().cpu() @ overlap(left))


def _rounded(maps: Tensor) -> Any:
    return [_rounded(part) for part in maps] if maps.ndim else float(f"{float(maps):.4g}")
