"""Position embeddings on other grids: torch's interpolation at the method's scale; timm's networks have them too."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.core import schema
from mokd.config import BranchConfig
from mokd.models import positions
from mokd.models.backbones import build_backbone


def interpolated(embeddings: Tensor, new: int) -> Tensor:
    """The method's formula, on `[G, G, d]`."""
    old = embeddings.shape[0]
    scale = (new + 0.1) / old
    out = F.interpolate(
        embeddings.permute(2, 0, 1)[None], scale_factor=(scale, scale), mode="bicubic", align_corners=False
    )
    return out[0].permute(1, 2, 0)


@pytest.mark.parametrize(("old", "new"), [(14, 6), (14, 7), (6, 14), (2, 1), (1, 3), (8, 8), (37, 14), (16, 31)])
def test_it_is_torch_s_interpolation_at_the_method_s_scale(old: int, new: int) -> None:
    embeddings = torch.randn(old, old, 5, dtype=torch.float64, requires_grad=True)
    ours = positions.resample(embeddings, new, new)
    theirs = embeddings if old == new else interpolated(embeddings, new)
    assert ours.shape == (new, new, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * towards).sum(), embeddings)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_grid_need_not_be_square() -> None:
    embeddings = torch.randn(6, 6, 3, dtype=torch.float64)
    tall, square = positions.resample(embeddings, 9, 4), positions.resample(embeddings, 9, 9)
    assert tall.shape == (9, 4, 3)
    torch.testing.assert_close(positions.resample(tall, 9, 4), tall)
    across = interpolated(embeddings, 9)
    torch.testing.assert_close(square, across)
    flat = positions.resample(torch.ones(5, 5, 1), 3, 8)
    torch.testing.assert_close(flat, torch.ones(3, 8, 1))


def test_half_precision_has_no_part_in_it() -> None:
    embeddings = torch.randn(14, 14, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under = positions.resample(embeddings, 6, 6)
    assert under.dtype == torch.float32
    assert torch.equal(under, positions.resample(embeddings, 6, 6))


def backbone_of(name: str, **options: object) -> torch.nn.Module:
    raw = {"name": "b", "backbone": name, "backbone_options": options, "optimizer": {"kind": "sgd", "lr": 0.1}}
    config = schema.validate(BranchConfig, raw, "test")
    return build_backbone(config, 64, drop_path=0.0, images_per_rank=1).eval()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_a_transformer_s_tokens_on_another_grid(name: str) -> None:
    options = {} if "_r_" in name else {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = backbone_of(name, **options)
    net, seen = backbone.net, []
    torch.nn.init.normal_(net.pos_embed)
    net.patch_embed.register_forward_hook(lambda module, given, out: seen.append(out))
    net.pos_drop.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        backbone(torch.randn(2, 3, 40, 40))
        patches, embedded = seen
        own, prefix = net.patch_embed.grid_size[0], net.num_prefix_tokens
        grid = patches.shape[1]
        assert grid != own
        expected = interpolated(net.pos_embed[0, prefix:].unflatten(0, (own, own)), grid)
        torch.testing.assert_close(embedded[:, prefix:], (patches + expected).flatten(1, 2))
        assert torch.equal(embedded[:, 0], (net.cls_token + net.pos_embed[:, :1])[:, 0].expand(2, -1))


def test_copies_have_embeddings_of_their_own_and_timm_s_networks_stay_timm_s() -> None:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = backbone_of("vit_tiny_patch16_224", **options)
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        before = backbone(images).tokens
        twin = copy.deepcopy(backbone)
        torch.nn.init.zeros_(twin.net.pos_embed)
        assert not torch.equal(twin(images).tokens, before)
        assert torch.equal(backbone(images).tokens, before)
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, img_size=64, **options)
        theirs.eval()
        theirs.load_state_dict(backbone.net.state_dict())
        assert (theirs.forward_features(images)[:, 1:] - before).abs().max() > 1e-4
        same = torch.randn(1, 3, 64, 64)
        assert torch.equal(theirs.forward_features(same)[:, 1:], backbone(same).tokens)


def test_the_class_token_starts_with_a_deviation_of_0_02() -> None:
    token = backbone_of("vit_base_patch16_224", depth=1).net.cls_token
    assert token.std().item() == pytest.approx(0.02, rel=0.2)
