"""Mean attention distance: cases by hand, and timm's own extraction of attention maps."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.utils import AttentionExtract
from torch import Tensor

from data_pipeline.core import schema
from mokd.analysis.attention_distance import attention_distance, attention_distances
from mokd.analysis.layers import attention_read, blocks_by_name, captured_maps
from mokd.config import BranchConfig
from mokd.models.backbones import Backbone, build_backbone
from tests.support import RESNET, VIT

CORNER = 8.0 * math.sqrt(2.0)  # between opposite cells of a grid of 2 x 2 on 16 pixels


def network(raw: dict[str, object], image_px: int = 32) -> Backbone:
    torch.manual_seed(0)
    branch = schema.validate(BranchConfig, raw, "branch")
    return build_backbone(branch, image_px, drop_path=0.0, images_per_rank=1).eval()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.eye(4), 0.0),
        (torch.full((4, 4), 0.25), (8.0 + 8.0 + CORNER) / 4),
        (torch.eye(4).flip(1), CORNER),
        (torch.eye(4)[[1, 0, 3, 2]], 8.0),
        (0.75 * torch.eye(4) + 0.25 * torch.eye(4)[[1, 0, 3, 2]], 2.0),
    ],
    ids=["itself", "everywhere", "opposite corner", "beside", "a quarter beside"],
)
def test_by_hand(rows: Tensor, expected: float) -> None:
    assert attention_distance(rows.view(1, 1, 4, 4), 0, 16).item() == pytest.approx(expected)


def test_class_tokens_have_no_place() -> None:
    between = torch.eye(4)[[1, 0, 3, 2]]
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0, 1:, 1:] = 0.1 * between
    weights[0, 0, 1:, 0] = 0.9  # most goes to the class token
    weights[0, 0, 0, :] = 0.2
    assert attention_distance(weights, 1, 16).item() == pytest.approx(8.0)


def test_of_every_block_and_head_as_timm_extracts_them() -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    vit = Backbone(timm.create_model("vit_tiny_patch16_224", **options)).eval()
    with torch.no_grad():
        for block in vit.net.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight.mul_(20.0)  # first weights look everywhere alike
    images = torch.randn(3, 3, 32, 32)
    found = attention_distances(vit, images)
    for block in vit.net.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
    with torch.no_grad():  # from the traced graph, by the names of its operations: no hooks
        maps = AttentionExtract(vit.net, method="fx")(images)
    assert len(maps) == len(found) == 2
    for weights, distances in zip(maps.values(), found.values(), strict=True):
        assert distances.shape == (3, 3)
        for b in range(3):
            for h in range(3):
                total = 0.0
                for q in range(16):
                    row = weights[b, h, 1 + q, 1:].double()
                    for k in range(16):
                        apart = math.dist((q // 4 * 8, q % 4 * 8), (k // 4 * 8, k % 4 * 8))
                        total += float(row[k] / row.sum()) * apart / 16
                assert distances[b, h].item() == pytest.approx(total, rel=1e-5)


def test_a_cnn_has_none_and_networks_are_left_as_they_were() -> None:
    assert attention_distances(network(RESNET), torch.randn(2, 3, 32, 32)) == {}
    vit = network(VIT)
    images = torch.randn(2, 3, 32, 32)
    fused = [part.fused_attn for part in vit.net.modules() if hasattr(part, "fused_attn")]
    with torch.no_grad():
        before = vit(images).pooled
        attention_distances(vit, images)
        assert torch.equal(vit(images).pooled, before)
    assert [part.fused_attn for part in vit.net.modules() if hasattr(part, "fused_attn")] == fused


def test_windowed_attention_is_left_out() -> None:
    swin = {
        **{key: value for key, value in VIT.items() if key != "backbone_options"},
        "backbone": "swin_tiny_patch4_window7_224",
        "backbone_options": {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    }
    backbone, images = network(swin, 64), torch.randn(2, 3, 64, 64)
    seen: list[int] = []
    with torch.no_grad(), attention_read(backbone.net, lambda _, weights: seen.append(len(weights))):
        backbone(images)
    assert seen == [2 * 16, 2 * 4]
    assert attention_distances(backbone, images) == {}
    with torch.no_grad(), captured_maps(backbone) as maps:
        backbone(images)
    assert [tuple(m.shape) for m in maps.values()] == [(2, 16, 16, 12), (2, 8, 8, 24)]


@pytest.mark.parametrize(("raw", "grids"), [(RESNET, [8, 4, 2, 1]), (VIT, [4, 4])], ids=["cnn", "vit"])
def test_maps_of_blocks(raw: dict[str, object], grids: list[int]) -> None:
    backbone, images = network(raw), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), captured_maps(backbone) as maps:
        features = backbone(images)
    assert list(maps) == list(blocks_by_name(backbone))
    assert [m.shape[1] for m in maps.values()] == grids
    if raw is RESNET:  # whose last block's map is the dense feature
        last = list(maps.values())[-1]
        assert torch.equal(last.flatten(1, 2), features.tokens)
