"""Linear layers by oneDNN against the same layers in double precision, and against torch's own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mokd.models.linear import _OPERATOR, OneDnnLinear, use_onednn

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, _OPERATOR)), reason="torch without oneDNN"
)


def network(*, bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 72, bias=bias), nn.GELU(), nn.Linear(72, 24, bias=bias))


def results(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients, the input's first."""
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in net.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 40), (3, 17, 40), (2, 40)])
def test_as_exact_as_torch(shape: tuple[int, ...], bias: bool) -> None:
    plain = network(bias=bias)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    use_onednn(ours)
    assert all(isinstance(layer, OneDnnLinear) for layer in (ours[0], ours[2]))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    for got, own, true in zip(results(ours, x), results(plain, x), results(exact, x.double()), strict=True):
        assert got.shape == true.shape
        largest = true.abs().max()
        assert (got - true).abs().max() <= 2.0 * (own - true).abs().max() + 1e-6 * largest


def test_columns_as_input() -> None:
    """Inputs and gradients that are not contiguous, as transposing blocks make them."""
    plain = network(bias=True)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    x = torch.randn(40, 9, 4).transpose(0, 2)
    for got, own in zip(results(ours, x), results(plain, x), strict=True):
        torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-5)


def test_names_and_other_precisions_stay() -> None:
    plain = network(bias=True)
    ours = copy.deepcopy(plain)
    use_onednn(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 40)
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours.float()(x), plain.float()(x))


def test_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        """A layer with a forward pass of its own."""

    net = nn.Sequential(Own(4, 4))
    use_onednn(net)
    assert type(net[0]) is Own
