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
