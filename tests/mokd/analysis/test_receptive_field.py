"""Effective receptive fields of kernels whose field one can write down, and of networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mokd.analysis.receptive_field import (
    central_fields,
    effective_field,
    field_distance,
    field_distances,
    half_weight_radius,
)
from tests.mokd.analysis.test_attention_distance import network
from tests.support import RESNET, VIT


def field(layers: nn.Module, at: tuple[int, int], side: int = 9) -> tuple[Tensor, float]:
    """The field of one cell, and its mean distance."""
    images = torch.randn(1, 3, side, side, requires_grad=True)
    output = layers(images).permute(0, 2, 3, 1)
    row, column = (torch.tensor([place]) for place in at)
    weights = effective_field(output, images, row, column, torch.ones(1, output.shape[-1]))
    grid = (output.shape[1], output.shape[2])
    return weights[0].detach(), field_distance(weights.detach(), row, column, grid).item()


def box(size: int, channels: int = 3, **options: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, 1, size, bias=False, **options)  # type: ignore[arg-type]
    nn.init.ones_(layer.weight)
    return layer


def test_a_box_of_3_by_3() -> None:
    weights, distance = field(box(3, padding=1), (4, 4))
    expected = torch.zeros(9, 9)
    expected[3:6, 3:6] = 1 / 9
    assert torch.allclose(weights, expected)
    assert distance == pytest.approx((4 * 1.0 + 4 * math.sqrt(2.0)) / 9)


def test_a_box_on_a_box_is_a_pyramid() -> None:
    weights, distance = field(nn.Sequential(box(3, padding=1), box(3, 1, padding=1)), (4, 4))
    line = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0]) / 9
    expected = torch.zeros(9, 9)
    expected[2:7, 2:7] = line[:, None] * line
    assert torch.allclose(weights, expected)
    by_hand = sum(float(line[r] * line[c]) * math.hypot(r - 2, c - 2) for r in range(5) for c in range(5))
    assert distance == pytest.approx(by_hand, rel=1e-6)


def test_a_corner_sees_less_and_a_patch_sees_itself() -> None:
    _, distance = field(box(3, padding=1), (0, 0))
    assert distance == pytest.approx((2 * 1.0 + math.sqrt(2.0)) / 4)
    weights, distance = field(box(4, stride=4), (1, 0), side=8)
    assert torch.allclose(weights[4:, :4], torch.full((4, 4), 1 / 16))
    assert distance == pytest.approx(
        (4 * math.hypot(0.5, 0.5) + 8 * math.hypot(0.5, 1.5) + 4 * math.hypot(1.5, 1.5)) / 16
    )


def test_signs_decide_which_channels_count() -> None:
    layer = nn.Conv2d(3, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, -3.0]])[..., None, None]
    images = torch.randn(1, 3, 4, 4, requires_grad=True)
    output = layer(images).permute(0, 2, 3, 1)
    at = torch.tensor([2])
    (gradient,) = torch.autograd.grad((output[0, 2, 2] * torch.tensor([1.0, -1.0])).sum(), images, retain_graph=True)
    assert gradient[0, :, 2, 2].tolist() == [0.0, 0.0, 6.0]
    for signs in ([1.0, 1.0], [1.0, -1.0]):
        weights = effective_field(output, images, at, at, torch.tensor([signs]))
        assert weights.sum().item() == weights[0, 2, 2].item() == pytest.approx(1.0)


def test_a_dead_output_has_no_distance() -> None:
    distance = field_distance(torch.zeros(1, 4, 4), torch.tensor([0]), torch.tensor([0]), (2, 2))
    assert math.isnan(distance.item())


def test_half_of_the_weight() -> None:
    weights = torch.zeros(8, 8)
    weights[4, 4], weights[4, 7] = 0.6, 0.4
    assert half_weight_radius(weights, 4.5) == 0.0
    weights[4, 4] = 0.3
    assert half_weight_radius(weights, 4.5) == 3.0


@pytest.mark.parametrize("raw", [RESNET, VIT], ids=["cnn", "vit"])
def test_of_networks(raw: dict[str, object]) -> None:
    backbone, images = network(raw), torch.randn(4, 3, 32, 32)
    found = field_distances(backbone, images, draws=3, seed=1)
    again = field_distances(backbone, images, draws=3, seed=1)
    for name, distances in found.items():
        assert distances.shape == (3, 4)
        assert torch.equal(distances, again[name])
        assert ((distances > 0) & (distances < 32 * math.sqrt(2))).all()
    means = [distances.mean().item() for distances in found.values()]
    if raw is RESNET:
        assert means[0] < means[1] < means[2]  # each block adds to what the one before has seen
    fields = central_fields(backbone, images, list(found), seed=1)
    for field_of_block, center in fields.values():
        assert field_of_block.sum().item() == pytest.approx(1.0, rel=1e-4)
        assert 16.0 <= center <= 24.0


def test_of_a_first_block_by_the_whole_jacobian() -> None:
    """Independent of hooks and of batches: every derivative of one output by every input."""
    backbone = network(RESNET)
    net, image = backbone.net, torch.randn(1, 3, 16, 16)

    def first_block(x: Tensor) -> Tensor:
        return net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x)))))  # type: ignore[operator]

    jacobian = torch.autograd.functional.jacobian(first_block, image)[0, :, 2, 2, 0]  # [C, 3, S, S]
    fields = central_fields(backbone, image, ["layer1.0"], seed=5)
    signs = torch.randint(2, (1, 8), generator=torch.Generator().manual_seed(5)) * 2.0 - 1.0
    expected = torch.einsum("c,cksx->ksx", signs[0], jacobian).abs().sum(dim=0)
    got, center = fields["layer1.0"]
    assert center == 10.0  # cell 2 of 4 on 16 pixels
    assert torch.allclose(got, expected / expected.sum(), atol=1e-6)
