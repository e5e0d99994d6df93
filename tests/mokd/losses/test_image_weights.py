"""Images that count less in a term: the fused loss against the reference in float64, and in fp32 by every kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokd.losses.kernels import cpu, plain
from mokd.losses.kernels.targets import Target
from mokd.losses.prototype_loss import distillation_loss, prototype_loss
from mokd.losses.prototypes import HeadOutput, PrototypeWeight
from mokd.losses.reference import paired_cross_entropy, row_cross_entropy
from tests.mokd.losses.test_losses import SHAPES, given, in_small_blocks, problem


def weighted(targets: list[Target], batch: int) -> tuple[list[Target], Tensor]:
    """The last target with weights of its images, one of them 0."""
    weights = torch.rand(batch, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[0] = 0.0
    last = targets[-1]
    scaled = last._replace(probabilities=last.probabilities * weights.unsqueeze(-1), image_weights=weights)
    return [*targets[:-1], scaled], weights


def reference(logits: Tensor, targets: list[Target], weights: Tensor, temperature: float) -> list[Tensor]:
    (own, other) = targets
    loss = paired_cross_entropy if other.paired else row_cross_entropy
    met = logits[other.first_view :]
    return [
        paired_cross_entropy(logits, own.probabilities, temperature),
        loss(met, other.probabilities, temperature, weights),
    ]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_reference(
    shape: tuple[int, ...], search: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_blocks(monkeypatch, 4)
    leaves, targets = problem(*shape, search=search)
    scaled, weights = weighted(targets, leaves[0].shape[1])
    rows, direction, gain = leaves
    logits = F.linear(rows, F.normalize(direction, dim=1) * gain)
    terms = reference(logits, targets, weights, 0.2)
    total = sum(t.weight * term for t, term in zip(targets, terms, strict=True))
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    found, found_terms = prototype_loss(given(leaves), scaled, 0.2, recompute=recompute)
    torch.testing.assert_close(found, total, rtol=1e-9, atol=0)
    torch.testing.assert_close(found_terms, torch.stack(terms).detach(), rtol=1e-9, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)

    leaf = logits.detach().requires_grad_()
    (expected_logits,) = torch.autograd.grad(total, logits)
    from_logits, _ = distillation_loss(leaf, scaled, 0.2)
    torch.testing.assert_close(from_logits, total, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(from_logits, leaf)[0], expected_logits, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "kernels", [plain, pytest.param(cpu, marks=pytest.mark.skipif(not cpu.available(), reason=""))]
)
def test_in_fp32_every_kernel_gives_it(kernels: object) -> None:
    leaves, targets = problem(5, 6, 8, 300, 2, search=True)
    targets, weights = weighted(targets, 6)
    exact, exact_terms = prototype_loss(given(leaves), targets, 0.2)
    exact_gradients = torch.autograd.grad(exact, leaves)
    by_prototype = [
        t._replace(
            probabilities=t.probabilities.float().permute(2, 0, 1).contiguous().permute(1, 2, 0),
            image_weights=None if t.image_weights is None else weights.float(),
        )
        for t in targets
    ]
    rows, direction, gain = (leaf.detach().float().requires_grad_() for leaf in leaves)
    weight = PrototypeWeight(direction, gain, direction.detach().norm(dim=1, keepdim=True))
    total, terms = prototype_loss(HeadOutput(rows, weight), by_prototype, 0.2, kernels=kernels)
    torch.testing.assert_close(terms.double(), exact_terms, rtol=1e-5, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, [rows, direction, gain]), exact_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6)


def test_weights_of_1_are_no_weights() -> None:
    leaves, targets = problem(5, 6, 8, 20, 2, search=False)
    ones = [targets[0], targets[1]._replace(image_weights=torch.ones(6, dtype=torch.float64))]
    (plainly, _), (found, _) = (prototype_loss(given(leaves), t, 0.2) for t in (targets, ones))
    torch.testing.assert_close(found, plainly, rtol=1e-12, atol=0)
