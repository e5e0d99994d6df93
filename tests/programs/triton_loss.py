"""The fused loss with Triton's kernels against the torch ones, on the GPU or in Triton's interpreter.

usage: TRITON_INTERPRET=1 python -m tests.programs.triton_loss
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mokd.losses import prototype_loss
from mokd.losses.kernels import plain, triton
from mokd.losses.kernels.targets import Target
from mokd.losses.prototype_loss import Kernels
from mokd.losses.prototypes import HeadOutput, Prototypes

V, Q, B, C, K = 4, 2, 2, 8, 1500  # a tile and a part of one


def main() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    head = Prototypes(C, K, train_gain=True)
    rows = torch.randn(V, B, C, requires_grad=True)
    self_, cross = (Target(torch.softmax(4 * torch.randn(Q, B, K), -1), w) for w in (1.0, 0.3))
    search = Target(torch.softmax(4 * torch.randn(V - Q, B, K), -1), 0.7, paired=False, first_view=Q)
    more = [self_, cross, self_, search]  # more than the kernels take: done by the others
    cases = [([self_, cross], True), ([search, self_], False), ([search], True), (more, False)]
    for targets, recompute in cases:
        options = {"recompute": recompute, "targets": targets, "temperature": 0.1}
        compare(*(results(rows, head, kernels=k, **options) for k in (triton, plain)))
    logits = torch.randn(V, B, K)
    compare(*(from_logits(logits, [self_, search], kernels=k) for k in (triton, plain)))
    half_precision_output()


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def results(rows: Tensor, head: Prototypes, **options: Any) -> list[Tensor]:
    total, terms = prototype_loss.prototype_loss(HeadOutput(rows, head()), **options)
    return [terms, *torch.autograd.grad(total, [rows, head.direction, head.gain])]


def from_logits(logits: Tensor, targets: list[Target], kernels: Kernels) -> list[Tensor]:
    logits = logits.clone().requires_grad_()
    total, terms = prototype_loss.distillation_loss(logits, targets, 0.1, kernels=kernels)
    return [terms, *torch.autograd.grad(total, logits)]


def half_precision_output() -> None:
    """The gradient is written in the type that the products take."""
    x, factor = torch.rand(V, B, K), torch.rand(V, B, 2)
    expected = x * factor.repeat_interleave(1024, dim=-1)[..., :K]
    out = triton.gradient(x.clone(), factor, [], torch.bfloat16, None, None)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=0)  # the interpreter rounds towards zero


if __name__ == "__main__":
    main()
