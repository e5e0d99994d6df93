"""Masks of stochastic depth that are drawn for all layers of a network at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mokd.models import drop_path
from mokd.models.backbones import Backbone, build_backbone
from mokd.models.drop_path import SampleDropPath, micro_batch
from mokd.parallel.activation_checkpointing import recompute_blocks
from tests.support import VIT, tiny_config

IMAGES, VIEWS = 4, 2


def backbone(seed: int = 0) -> Backbone:
    """Of 3 blocks, whose rates grow from 0 on."""
    options = {**VIT["backbone_options"], "depth": 3}
    config = tiny_config(branches=[{**VIT, "backbone_options": options}])
    torch.manual_seed(seed)
    return build_backbone(config.branches[0], 32, drop_path=0.6, images_per_rank=IMAGES).train()


def one_by_one(network: Backbone) -> Backbone:
    network.drop_paths = []
    return network


def outputs(network: Backbone, images: Tensor, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    return network(images).tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_that_layers_draw_one_by_one(dtype: torch.dtype) -> None:
    images = torch.randn(VIEWS * IMAGES, 3, 32, 32, dtype=dtype)
    alone, together = one_by_one(backbone()).to(dtype), backbone().to(dtype)
    assert [layer.p for layer in together.drop_paths] == pytest.approx([0.3, 0.3, 0.6, 0.6])
    expected = outputs(alone, images)
    assert torch.equal(outputs(together, images), expected)
    assert not torch.equal(outputs(together, images, seed=8), expected)
    for index in range(2):  # parts of a batch draw what belongs to their images
        with micro_batch(index, 2):
            part = images.unflatten(0, (VIEWS, IMAGES)).chunk(2, dim=1)[index].flatten(0, 1)
            found = outputs(together, part)
        assert torch.equal(found, expected.unflatten(0, (VIEWS, IMAGES)).chunk(2, dim=1)[index].flatten(0, 1))


def test_one_draw_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[Any] = []
    rand = torch.rand
    monkeypatch.setattr(drop_path.torch, "rand", lambda *shape, **how: draws.append(shape) or rand(*shape, **how))
    images = torch.randn(VIEWS * IMAGES, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(backbone(), images)
        assert draws == [(4, VIEWS, 1, IMAGES)]
        assert torch.equal(found, outputs(one_by_one(backbone()), images))


def test_nothing_is_drawn_in_evaluation_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = backbone(), torch.randn(IMAGES, 3, 32, 32)
    network(images)
    assert all(layer.keep is None for layer in network.drop_paths)
    monkeypatch.setattr(drop_path.torch, "rand", None)
    network.eval()(images)


def test_blocks_that_are_computed_again_draw_the_same_again() -> None:
    images = torch.randn(VIEWS * IMAGES, 3, 32, 32)
    gradients = []
    for again in (False, True):
        network = backbone()
        if again:
            recompute_blocks(network, "branches.vit")
        outputs(network, images).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_layer_whose_rows_are_others_draws_by_itself() -> None:
    layer = SampleDropPath(0.5, IMAGES)
    layer.keep = torch.zeros(3)
    assert layer(torch.ones(2 * IMAGES, 5)).shape == (2 * IMAGES, 5)
