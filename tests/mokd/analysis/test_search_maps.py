"""Search maps: the weights of the T-Head's first block, written out; crops; shares of a box."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mokd.analysis.maps import _share_inside
from mokd.analysis.search_maps import crop_boxes, cut, search_maps
from mokd.models.heads import THead
from mokd.objectives.base import build_objective
from mokd.objectives.dino_network import Network
from tests.support import CONTRASTIVE, tiny_config


def weights_by_hand(head: THead, tokens: Tensor) -> Tensor:
    """The mean over heads of the first block's attention `[B, N, N]`."""
    block = head.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)


@torch.no_grad()
def test_where_a_query_looks_and_who_takes_it_up() -> None:
    config = tiny_config()
    objective = build_objective(config, torch.device("cpu"))
    torch.manual_seed(0)
    cnn, vit = (objective.build_network(branch, 1, student=False).eval() for branch in config.branches)
    images, crops = torch.randn(3, 3, 64, 64), torch.randn(2, 3, 3, 16, 16)
    for searcher, searched, grid in ((cnn, vit, 8), (vit, cnn, 2)):
        assert isinstance(searcher, Network)
        assert isinstance(searched, Network)
        searched.t_head.blocks[0].attn.qkv.weight.mul_(30.0)  # first weights look everywhere alike
        found = search_maps(searcher, searched, images, crops)
        assert found.takes is not None
        assert found.looks.shape == found.takes.shape == (2, 3, grid, grid)
        tokens, _ = searched.t_head.embed(searched.backbone(images))
        for part in range(2):
            _, query = searcher.t_head.embed(searcher.backbone(crops[part]))
            weights = weights_by_hand(searched.t_head, torch.cat([query[:, None], tokens], dim=1))
            looks, takes = weights[:, 0, 1:], weights[:, 1:, 0]
            for got, expected in ((found.looks, looks), (found.takes, takes)):
                expected = expected / expected.sum(dim=1, keepdim=True)
                assert torch.allclose(got[part].flatten(1), expected, atol=1e-6)


@torch.no_grad()
def test_of_the_contrastive_objective_it_is_the_matching() -> None:
    config = tiny_config(**CONTRASTIVE)
    objective = build_objective(config, torch.device("cpu"))
    cnn, vit = (objective.build_network(branch, 1, student=True).eval() for branch in config.branches)
    images, crops = torch.randn(3, 3, 32, 32), torch.randn(2, 3, 3, 32, 32)
    found = search_maps(cnn, vit, images, crops)
    assert found.takes is None
    dense = vit(images.unsqueeze(0), dense=True).dense[0]  # [B, 16, D]
    query = cnn(crops).projected[1]
    maps = cnn.matching.extraction(dense.transpose(1, 2).unflatten(2, (4, 4)))
    cosine = torch.nn.functional.cosine_similarity(maps.flatten(2), query[:, :, None], dim=1)
    assert torch.allclose(found.looks[1].flatten(1), cosine.softmax(dim=1), atol=1e-6)


def test_crops() -> None:
    config = tiny_config()
    boxes = crop_boxes(config, 32, 2, 7)
    assert boxes == crop_boxes(config, 32, 2, 7) != crop_boxes(config, 32, 2, 8)
    for left, top, side in boxes:
        assert side == 16  # half of each side: a quarter, the middle of 0.1 to 0.4
        assert 0 <= left <= 16
        assert 0 <= top <= 16
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(cut(images, [[(0, 0, 32)], [(0, 0, 32)]], 32)[0], images, atol=1e-5)
    flat = torch.zeros(1, 3, 32, 32)
    flat[:, :, 8:24, 4:20] = 1.0
    assert torch.allclose(cut(flat, [[(4, 8, 16)]], 8)[0], torch.ones(1, 3, 8, 8), atol=1e-5)


def test_the_share_within_a_box() -> None:
    even = torch.full((4, 4), 1 / 16)
    assert _share_inside(even, (0, 0, 32), 32) == pytest.approx(1.0)
    assert _share_inside(even, (3, 5, 16), 32) == pytest.approx(0.25)
    one = torch.zeros(4, 4)
    one[1, 2] = 1.0  # pixels 8 to 16 from the top, 16 to 24 from the left
    assert _share_inside(one, (16, 8, 8), 32) == pytest.approx(1.0)
    assert _share_inside(one, (20, 8, 8), 32) == pytest.approx(0.5)
    assert _share_inside(one, (8, 16, 8), 32) == 0.0
