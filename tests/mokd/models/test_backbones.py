from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.config import BranchConfig
from mokd.models.backbones import build_backbone, measure_shapes
from mokd.weights.formats import load_weights


def branch(backbone: str, **changes: object) -> BranchConfig:
    raw = {"name": "b", "backbone": backbone, "optimizer": {"kind": "sgd", "lr": 0.1}, **changes}
    return schema.validate(BranchConfig, raw, "test")


@pytest.mark.parametrize(
    ("name", "pooled", "width", "grids", "sequence"),
    [
        ("resnet50", 2048, 2048, {224: 7, 96: 3}, False),
        ("vit_small_patch16_224", 384, 384, {224: 14, 96: 6}, True),
        ("convnext_tiny", 768, 768, {224: 7, 96: 3}, False),
        ("swin_tiny_patch4_window7_224", 768, 768, {224: 7, 96: 3}, False),
        ("mobilenetv3_small_100", 1024, 576, {224: 7, 96: 3}, False),
        ("xcit_nano_12_p16_224", 128, 128, {224: 14, 96: 6}, True),
    ],
)
def test_timm_networks_behind_one_interface(
    name: str, pooled: int, width: int, grids: dict[int, int], sequence: bool
) -> None:
    shapes = measure_shapes(branch(name), 224, (224, 96))
    assert (shapes.pooled_width, shapes.width, shapes.grids, shapes.is_sequence) == (pooled, width, grids, sequence)


def test_features_of_a_map_are_row_major_tokens() -> None:
    backbone = build_backbone(branch("resnet18"), 64, drop_path=0.0, images_per_rank=1).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(images)
        dense = backbone.net.forward_features(images)
    assert torch.equal(features.tokens[:, 1], dense[:, :, 0, 1])
    torch.testing.assert_close(features.pooled, dense.mean(dim=(2, 3)))
    assert features.cls is None


def test_cifar_stem_keeps_the_resolution() -> None:
    assert measure_shapes(branch("resnet18", stem="cifar"), 32, (32, 16)).grids == {32: 4, 16: 2}
    assert measure_shapes(branch("resnet18", stem="cifar_stride2"), 32, (32, 16)).grids == {32: 2, 16: 1}
    with pytest.raises(UserError, match="for ResNets"):
        measure_shapes(branch("vit_tiny_patch16_224", stem="cifar"), 32, (32,))


def test_resnets_have_torchvisions_keys_and_start_from_its_file(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    backbone = build_backbone(branch("resnet18"), 64, drop_path=0.0, images_per_rank=1)
    assert set(theirs.state_dict()) - set(backbone.net.state_dict()) == {"fc.weight", "fc.bias"}
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "weights.pth")
    for file in ("weights.safetensors", "weights.pth"):
        backbone = build_backbone(branch("resnet18"), 64, drop_path=0.0, images_per_rank=1)
        load_weights(backbone, tmp_path / file, "branches.b")
        assert torch.equal(backbone.net.conv1.weight, theirs.conv1.weight)
    other = build_backbone(branch("resnet34"), 64, drop_path=0.0, images_per_rank=1)
    with pytest.raises(UserError, match=r"needs 'layer1\.2"):
        load_weights(other, tmp_path / "weights.pth", "branches.b")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        raise_ = exec
        return raise_, ("raise SystemExit('code from a weights file ran')",)


def test_arbitrary_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": Evil()}}, tmp_path / "evil.pth")
    backbone = build_backbone(branch("resnet18"), 64, drop_path=0.0, images_per_rank=1)
    with pytest.raises(UserError, match="cannot be read safely"):
        load_weights(backbone, tmp_path / "evil.pth", "branches.b")


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        ({"backbone": "resnet5O"}, (224,), "timm has no model 'resnet5O'"),
        ({"backbone": "vit_small_patch16_224"}, (224, 90), "cannot take crops of 90 px"),
        ({"backbone": "resnet18", "backbone_options": {"wings": 2}}, (224,), "refuses them"),
        ({"backbone": "maxvit_tiny_tf_224"}, (224, 96), "cannot take crops of 96 px"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(config: dict, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        measure_shapes(branch(**config), 224, sizes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
