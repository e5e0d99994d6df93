"""The checkpoints of other programs, written here in their layouts around the weights of a network of timm's."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.config import BranchConfig
from mokd.models.backbones import Backbone, build_backbone
from mokd.weights.formats import load_weights
from mokd.weights.sources import find

Tensors = dict[str, Tensor]
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}


def branch(backbone: str, **keys: Any) -> BranchConfig:
    return BranchConfig.model_validate(
        {"name": "b", "backbone": backbone, "optimizer": {"kind": "sgd", "lr": 0.1}, **keys}
    )


def network(backbone: str, **options: Any) -> tuple[BranchConfig, Backbone]:
    """A branch, and its backbone with weights that no fresh network has."""
    config = branch(backbone, backbone_options=options)
    built = build_backbone(config, 28, drop_path=0.0, images_per_rank=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in built.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01)
    return config, built


def dino(net: Tensors) -> Any:
    student = {f"module.backbone.{key}": torch.zeros_like(value) for key, value in net.items()}
    teacher = {f"backbone.{key}": value for key, value in net.items()}
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_v": torch.zeros(2, 2)}
    arguments = argparse.Namespace(arch="vit_tiny", lr=0.1, output_dir=Path("out"))
    return {"student": student, "teacher": {**teacher, **head}, "args": arguments, "optimizer": {"state": {}}}


def dinov2(net: Tensors) -> Any:
    """The teacher of a training with blocks in chunks; registers have another name, the class token a position."""
    net = dict(net)
    net["register_tokens"] = net.pop("reg_token")
    net["pos_embed"] = torch.cat([torch.zeros_like(net["cls_token"]), net["pos_embed"]], dim=1)
    net["mask_token"] = torch.zeros(1, 24)
    chunked = {key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for key, v in net.items()}
    return {
        "teacher": {**{f"backbone.{k}": v for k, v in chunked.items()}, "dino_head.mlp.0.weight": torch.zeros(2, 2)}
    }


def dinov3(net: Tensors) -> Any:
    names = {"reg_token": "storage_tokens", ".gamma_1": ".ls1.gamma", ".gamma_2": ".ls2.gamma"}
    renamed = {}
    for key, value in net.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return {
        **renamed,
        "mask_token": torch.zeros(1, 24),
        "rope_embed.periods": torch.zeros(2),
        "blocks.0.attn.qkv.bias_mask": torch.zeros(72),
    }


def moco(net: Tensors) -> Any:
    query = {f"module.encoder_q.{key}": value for key, value in net.items()}
    key = {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in net.items()}
    head = {"module.encoder_q.fc.0.weight": torch.zeros(2, 2)}
    return {"arch": "resnet18", "state_dict": {**query, **key, **head, "module.queue": torch.zeros(2, 4)}}


def mocov3(net: Tensors) -> Any:
    base = {f"module.base_encoder.{key}": value for key, value in net.items()}
    momentum = {f"module.momentum_encoder.{key}": torch.zeros_like(value) for key, value in net.items()}
    head = {"module.base_encoder.head.0.weight": torch.zeros(2, 2), "module.predictor.0.weight": torch.zeros(2, 2)}
    return {"state_dict": {**base, **momentum, **head}}


def lightly(net: Tensors) -> Any:
    """A sequence of a ResNet's children, as its examples build backbones."""
    bare = torchvision.models.resnet18()
    bare.load_state_dict(net, strict=False)
    sequence = nn.Sequential(*list(bare.children())[:-1])
    head = {"projection_head.layers.0.weight": torch.zeros(2, 2)}
    return {"state_dict": {**{f"backbone.{key}": value for key, value in sequence.state_dict().items()}, **head}}


@pytest.mark.parametrize(
    ("write", "backbone", "options"),
    [
        (dino, "vit_tiny_patch16_224", TINY),
        (dino, "resnet18", {}),
        (dinov2, "vit_small_patch14_reg4_dinov2", TINY),
        (dinov3, "vit_small_patch16_dinov3", TINY),
        (moco, "resnet18", {}),
        (mocov3, "vit_tiny_patch16_224", TINY),
        (lightly, "resnet18", {}),
        (dict, "convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    ],
)
def test_checkpoints_of_other_programs_are_read(
    write: Callable[[Tensors], Any], backbone: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config, theirs = network(backbone, **options)
    torch.save(write(theirs.net.state_dict()), tmp_path / "checkpoint.pth")
    ours = build_backbone(config, 28, drop_path=0.0, images_per_rank=1)
    load_weights(ours, tmp_path / "checkpoint.pth", "branches.b")
    expected, found = theirs.state_dict(), ours.state_dict()
    different = [key for key, value in expected.items() if value.ndim and not torch.equal(found[key], value)]
    assert different == []


def test_position_embeddings_of_another_grid_are_those_that_timm_makes_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **TINY)
    torch.save(large.state_dict(), tmp_path / "large.pth")
    ours = build_backbone(branch("vit_tiny_patch16_224", backbone_options=TINY), 32, drop_path=0.0, images_per_rank=1)
    load_weights(ours, tmp_path / "large.pth", "branches.b")
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "large.pth")},
        num_classes=0,
        img_size=32,
        **TINY,
    )
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images).pooled, theirs.eval()(images), rtol=1e-6, atol=1e-6)


def save(path: Path, tensors: Tensors) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


@pytest.mark.parametrize(
    ("backbone", "options", "says"),
    [
        ("vit_tiny_patch16_224", {**TINY, "embed_dim": 36}, "'cls_token' is [1, 1, 24] instead of [1, 1, 36], "),
        (
            "vit_tiny_patch16_224",
            {**TINY, "depth": 3},
            "branches.b needs 'blocks.2.norm1.weight', 'blocks.2.norm1.bias'",
        ),
        ("vit_tiny_patch16_224", {**TINY, "depth": 1}, "(12 keys in all), which branches.b does not know"),
        ("vit_tiny_patch16_224", {**TINY, "patch_size": 8}, "'patch_embed.proj.weight' is [24, 3, 16, 16] instead of"),
        ("resnet18", {}, "branches.b needs 'conv1.weight', 'bn1.weight' (100 keys in all), which it does not hold"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_another_network_are_refused_by_the_first_mismatches(
    backbone: str, options: dict[str, Any], says: str, suffix: str, tmp_path: Path
) -> None:
    _, theirs = network("vit_tiny_patch16_224", **TINY)
    save(tmp_path / f"weights.{suffix}", theirs.net.state_dict())
    config = branch(backbone, backbone_options=options, init=str(tmp_path / f"weights.{suffix}"))
    with pytest.raises(UserError) as caught:
        find(config, 28)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/weights.{suffix}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read safely as weights"),
        (b"not weights at all", "cannot be read safely as weights"),
        ([1, 2], "holds list, not a state dict"),
        ({"state_dict": {}}, "branches.b needs 'conv1.weight'"),
        ({"state_dict": {}, "trainer": BranchConfig}, "holds a mokd.config.branches.BranchConfig, .* keep the tensors"),
    ],
)
def test_what_is_no_file_of_weights_is_said_in_one_line(content: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=says) as caught:
        find(branch("resnet18", init=str(file)), 28)
    assert "\n" not in str(caught.value)


def test_tensors_take_the_types_of_the_network(tmp_path: Path) -> None:
    config, theirs = network("vit_tiny_patch16_224", **TINY)
    half = {key: value.bfloat16() for key, value in theirs.net.state_dict().items()}
    save(tmp_path / "half.safetensors", half)
    found = find(config.model_copy(update={"init": str(tmp_path / "half.safetensors")}), 28)
    assert {value.dtype for value in found.backbone.values()} == {torch.float32}
    assert torch.equal(found.backbone["net.cls_token"], half["cls_token"].float())
