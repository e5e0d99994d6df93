from __future__ import annotations

import torch
from torch import Tensor

from mokd.losses.kernels import scratch

SIZE = scratch._WORTHWHILE_BYTES // 4 + 1000


def large() -> Tensor:
    return scratch.empty([SIZE], torch.float32, torch.device("cpu"))


def test_memory_is_lent_again_only_when_nothing_refers_to_it() -> None:
    first = large().fill_(1.5)
    address, view = first.data_ptr(), first[10:20]
    assert first.shape == (SIZE,)
    del first
    second = large()
    assert second.data_ptr() != address
    assert view.sum().item() == 15.0
    del view
    third = large()
    assert third.data_ptr() == address
    assert second.data_ptr() != third.data_ptr()


def test_a_gradient_keeps_its_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    gradient = large().fill_(2.0)
    torch.autograd.backward(parameter, gradient)
    del gradient
    others = [large().fill_(0.0) for _ in range(3)]
    assert all((other == 0.0).all() for other in others)
    assert parameter.grad is not None
    assert (parameter.grad == 2.0).all()


def test_small_tensors_and_those_of_other_devices_are_torch_s() -> None:
    small = scratch.empty([3, 4], torch.float64, torch.device("cpu"))
    assert (small.shape, small.dtype) == ((3, 4), torch.float64)
    assert scratch.empty([SIZE], torch.float32, torch.device("meta")).device.type == "meta"
