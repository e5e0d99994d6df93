"""torchvision's vision transformers and ConvNeXts under timm's names: the same features, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from data_pipeline.core.errors import UserError
from mokd.config import BranchConfig
from mokd.models.backbones import Backbone, build_backbone
from mokd.weights.sources import find
from mokd.weights.torchvision_names import to_timm, to_torchvision

PX = 64
STAGES = [(8, 12, 1), (12, 16, 2), (16, 20, 3), (20, None, 1)]
SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL_CONVNEXT = {"dims": [8, 12, 16, 20], "depths": [1, 2, 3, 1]}
# torchvision's weights, timm's network of the same kind, and what makes it small
CASES = [
    ("ViT_B_16_Weights.IMAGENET1K_V1", "vit_base_patch16_224", SMALL_VIT),
    ("ConvNeXt_Tiny_Weights.IMAGENET1K_V1", "convnext_tiny", SMALL_CONVNEXT),
    # linear layers as 1x1 convolutions
    ("ConvNeXt_Tiny_Weights.IMAGENET1K_V1", "convnext_atto", SMALL_CONVNEXT),
]


def transformer(px: int = PX) -> nn.Module:
    return models.VisionTransformer(px, 16, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=10)


def random(net: nn.Module) -> nn.Module:
    """A network in which every tensor counts, the class token and the scales of layers among them."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net.eval()


def small(weights: str, px: int = PX) -> tuple[nn.Module, nn.Module]:
    """torchvision's network of a kind, made small, with its classifier; and the same one up to its features."""
    if weights.startswith("ViT"):
        whole, features = random(transformer(px)), random(transformer(px))
        features.heads = nn.Identity()
    else:
        whole, features = (random(models.ConvNeXt([CNBlockConfig(*stage) for stage in STAGES])) for _ in range(2))
        features.classifier[2] = nn.Identity()  # type: ignore[index, operator]
    return whole, features


def branch(backbone: str, weights: str, options: dict[str, Any]) -> BranchConfig:
    return BranchConfig.model_validate(
        {
            "name": "b",
            "backbone": backbone,
            "backbone_options": options,
            "init": f"torchvision:{weights}",
            "optimizer": {"kind": "sgd", "lr": 0.1},
        }
    )


@pytest.fixture
def cache(offline: Path) -> Path:
    """torch's cache of files, and no connection."""
    folder = offline / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def cached(cache: Path, weights: str, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, cache / models.get_weight(weights).url.rpartition("/")[2])


def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's state dict as the files of torchvision have it, from before its layers were numbered."""
    return {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for key, v in tensors.items()}


def with_weights(config: BranchConfig, px: int = PX) -> Backbone:
    built = build_backbone(config, px, drop_path=0.0, images_per_rank=1)
    built.load_state_dict(find(config, px).backbone)
    return built.eval()


@pytest.mark.parametrize(("weights", "backbone", "options"), CASES)
@pytest.mark.parametrize("write", [dict, as_published])
def test_a_branch_that_starts_from_torchvisions_weights_has_its_features(
    write: Any, weights: str, backbone: str, options: dict[str, Any], cache: Path
) -> None:
    whole, features = small(weights)
    cached(cache, weights, write(whole.state_dict()))
    ours = with_weights(branch(backbone, weights, options))
    images = torch.randn(3, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = features(images), ours(images).pooled
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_position_embeddings_of_another_grid_are_resampled_as_timm_does_it(cache: Path) -> None:
    weights, backbone, options = CASES[0]
    whole, _ = small(weights, 96)
    cached(cache, weights, whole.state_dict())
    ours = with_weights(branch(backbone, weights, options))
    torch.testing.assert_close(ours.net.pos_embed[:, :1], whole.encoder.pos_embedding[:, :1])
    theirs = timm.layers.resample_abs_pos_embed(whole.encoder.pos_embedding, [4, 4])
    torch.testing.assert_close(ours.net.pos_embed, theirs)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *[
            (f"vit_{a}_{patch}", f"vit_{b}_patch{patch}_224")
            for a, b in (("b", "base"), ("l", "large"))
            for patch in (16, 32)
        ],
        ("vit_h_14", "vit_huge_patch14_224"),
        *[(f"convnext_{size}", f"convnext_{size}") for size in ("tiny", "small", "base", "large")],
    ],
)
def test_published_networks_have_these_names_there_and_back(theirs: str, ours: str) -> None:
    with torch.device("meta"):
        torchvisions = models.get_model(theirs).state_dict()
        timms = timm.create_model(ours).state_dict()
    heads = ("heads.", "classifier.2.", "head.weight", "head.bias", "head.fc.")
    shapes = {key: value.shape for key, value in timms.items() if not key.startswith(heads)}
    there = to_timm(torchvisions, timms)
    assert {key: value.shape for key, value in there.items() if not key.startswith(heads)} == shapes
    back = to_torchvision(there, torchvisions)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in torchvisions.items()}


@pytest.mark.parametrize(
    ("weights", "backbone", "options", "says"),
    [
        (CASES[0][0], "vit_base_patch16_224", {**SMALL_VIT, "embed_dim": 36}, "'cls_token' is [1, 1, 24] instead of"),
        (CASES[0][0], "vit_base_patch16_224", {**SMALL_VIT, "depth": 3}, "branches.b needs 'blocks.2.norm1.weight'"),
        (CASES[0][0], "convnext_tiny", SMALL_CONVNEXT, "branches.b needs 'stem.0.weight'"),
        (CASES[1][0], "resnet18", {}, "branches.b needs 'conv1.weight'"),
        (CASES[1][0], "convnext_tiny", {**SMALL_CONVNEXT, "depths": [1, 1, 3, 1]}, "holds 'stages.1.blocks.1."),
    ],
)
def test_weights_of_another_network_are_refused_in_one_line(
    weights: str, backbone: str, options: dict[str, Any], says: str, cache: Path
) -> None:
    cached(cache, weights, small(weights)[0].state_dict())
    with pytest.raises(UserError) as caught:
        find(branch(backbone, weights, options), PX)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"branches.b.init torchvision:{weights}: ")


@pytest.mark.parametrize("weights", ["ViT_B_16_Weights.IMAGENET1K_V1", "ConvNeXt_Tiny_Weights.IMAGENET1K_V1"])
def test_without_a_connection_it_is_one_line(weights: str, cache: Path) -> None:
    with pytest.raises(UserError, match="is not in the cache and cannot be downloaded") as caught:
        find(branch("vit_base_patch16_224", weights, {}), PX)
    assert "\n" not in str(caught.value)
