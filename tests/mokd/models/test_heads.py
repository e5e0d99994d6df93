"""The heads' first weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mokd.config import MlpHeadConfig, THeadConfig
from mokd.models.backbones import BackboneShapes
from mokd.models.heads import MlpHead, THead


def test_linear_layers_are_narrow_but_the_map_into_the_t_head_is_a_convolution_s_default() -> None:
    torch.manual_seed(0)
    t_head = THead(THeadConfig(width=96), BackboneShapes(400, 400, False, {224: 7}), 224, 512)
    mlp_head = MlpHead(MlpHeadConfig(hidden=256), 400, 512)
    conv = nn.Conv2d(400, 96, kernel_size=1)
    for own, default in ((t_head.project.weight, conv.weight), (t_head.project.bias, conv.bias)):
        assert own.abs().max().item() == pytest.approx(400**-0.5, rel=0.05)
        assert own.std().item() == pytest.approx(default.std().item(), rel=0.3 if own.ndim == 1 else 0.02)
    for part in (t_head.blocks, mlp_head.mlp):
        for layer in (module for module in part.modules() if isinstance(module, nn.Linear)):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()


def test_the_scale_of_the_prototypes_changes_nothing_but_the_length_of_their_directions() -> None:
    heads = []
    for scale in (1.0, 0.2):
        torch.manual_seed(0)
        heads.append(
            [
                MlpHead(MlpHeadConfig(hidden=64, bottleneck=32), 40, 512, scale),
                THead(THeadConfig(width=48, depth=1), BackboneShapes(40, 40, False, {32: 4}), 32, 512, scale),
            ]
        )
    for default, scaled in zip(*heads, strict=True):
        own = scaled.state_dict()
        for key, value in default.state_dict().items():
            torch.testing.assert_close(own[key], 0.2 * value if key == "last_layer.direction" else value)
        assert default.last_layer.direction.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.02)
