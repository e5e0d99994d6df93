from __future__ import annotations

import pytest
import timm
import torch

from mokd.models.blocks import repeated_blocks


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("resnet50", 16, "Bottleneck"),
        ("resnet18d", 8, "BasicBlock"),
        ("vit_small_patch16_224", 12, "Block"),
        ("convnext_tiny", 18, "ConvNeXtBlock"),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
        ("efficientnet_b0", 16, None),
        ("vgg11", 0, None),
    ],
)
def test_blocks_are_the_residual_units_and_hold_each_weight_once(name: str, count: int, kind: str | None) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    blocks = repeated_blocks(net)
    assert len(blocks) == count
    assert kind is None or {type(block).__name__ for block in blocks} == {kind}
    inside = [parameter for block in blocks for parameter in block.parameters()]
    assert len(set(inside)) == len(inside)
    if count:
        assert sum(p.numel() for p in inside) > 0.8 * sum(p.numel() for p in net.parameters())
