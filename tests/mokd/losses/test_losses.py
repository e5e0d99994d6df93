"""The fused loss against the reference, which autograd differentiates, in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mokd.losses import prototype_loss as module
from mokd.losses.kernels import cpu, plain
from mokd.losses.kernels.targets import Target, entropy
from mokd.losses.prototype_loss import distillation_loss, prototype_loss
from mokd.losses.prototypes import HeadOutput, Prototypes, PrototypeWeight, logits_in
from mokd.losses.reference import paired_cross_entropy, row_cross_entropy
from mokd.losses.teacher_probabilities import teacher_probabilities
from tests.support import ROOT


def reference(logits: Tensor, targets: Sequence[Target], temp: float) -> list[Tensor]:
    return [
        paired_cross_entropy(logits, t.probabilities, temp)
        if t.paired
        else row_cross_entropy(logits[t.first_view :], t.probabilities, temp)
        for t in targets
    ]


def problem(
    views: int, batch: int, width: int, prototypes: int, teachers: int, *, search: bool, seed: int = 0
) -> tuple[list[Tensor], list[Target]]:
    """Rows, direction and gain as leaves, and the targets of a head: self, cross and, where asked for, search."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [draw(views, batch, width), draw(prototypes, width), 1.0 + 0.2 * draw(prototypes, 1)]
    targets = [
        Target(teacher_probabilities(draw(teachers, batch, prototypes), draw(prototypes), 0.5), 1.0),
        Target(teacher_probabilities(draw(teachers, batch, prototypes), None, 0.3), 0.3),
    ]
    if search and views > teachers:
        found = teacher_probabilities(draw(views - teachers, batch, prototypes), None, 0.3)
        targets[1] = Target(found, 0.7, paired=False, first_view=teachers)
    return [leaf.requires_grad_() for leaf in leaves], targets


def given(leaves: Sequence[Tensor]) -> HeadOutput:
    rows, direction, gain = leaves
    return HeadOutput(rows, PrototypeWeight(direction, gain, direction.detach().norm(dim=1, keepdim=True)))


def in_small_blocks(monkeypatch: pytest.MonkeyPatch, granule: int) -> None:
    monkeypatch.setattr(module, "_GRANULE", granule)
    monkeypatch.setattr(module, "_CPU_BLOCK_BYTES_PER_THREAD", 0)


SHAPES = [(10, 2, 4, 7, 2), (2, 1, 3, 5, 2), (5, 2, 6, 11, 3), (4, 2, 3, 9, 1)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_the_reference(
    shape: tuple[int, ...], search: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small_blocks(monkeypatch, 4)  # several blocks, the last one smaller
    leaves, targets = problem(*shape, search=search)
    rows, direction, gain = leaves
    terms = reference(F.linear(rows, F.normalize(direction, dim=1) * gain), targets, 0.2)
    total = sum(t.weight * term for t, term in zip(targets, terms, strict=True))
    expected = torch.autograd.grad(3.0 * total, leaves)

    found, found_terms = prototype_loss(given(leaves), targets, 0.2, recompute=recompute)
    torch.testing.assert_close(found, total, rtol=1e-9, atol=0)
    torch.testing.assert_close(found_terms, torch.stack(terms).detach(), rtol=1e-9, atol=0)
    for ours, theirs in zip(torch.autograd.grad(3.0 * found, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_from_logits_it_is_the_same(shape: tuple[int, ...], search: bool) -> None:
    (rows, direction, _), targets = problem(*shape, search=search)
    logits = F.linear(rows, direction).detach().requires_grad_()
    terms = reference(logits, targets, 0.2)
    (expected,) = torch.autograd.grad(sum(2.0 * t.weight * x for t, x in zip(targets, terms, strict=True)), logits)
    total, found = distillation_loss(logits, targets, 0.2)
    torch.testing.assert_close(found, torch.stack(terms).detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(2.0 * total, logits)[0], expected, rtol=1e-6, atol=1e-12)


def test_a_zero_gain_still_learns() -> None:
    leaves, targets = problem(4, 2, 3, 9, 2, search=False)
    leaves[2].data[4] = 0.0
    rows, direction, gain = leaves
    terms = reference(F.linear(rows, F.normalize(direction, dim=1) * gain), targets, 0.2)
    expected = torch.autograd.grad(terms[0] + 0.3 * terms[1], leaves)
    found = torch.autograd.grad(prototype_loss(given(leaves), targets, 0.2)[0], leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


def test_frozen_prototypes_get_no_gradient_and_rows_the_same() -> None:
    leaves, targets = problem(5, 2, 3, 9, 2, search=True)
    (expected,) = torch.autograd.grad(prototype_loss(given(leaves), targets, 0.2)[0], leaves[:1])
    prototype_loss(given(leaves), targets, 0.2, train_prototypes=False)[0].backward()
    assert torch.equal(leaves[0].grad, expected)
    assert leaves[1].grad is None
    assert leaves[2].grad is None


def test_it_is_differentiated_once() -> None:
    leaves, targets = problem(2, 1, 3, 5, 2, search=False)
    total, _ = prototype_loss(given(leaves), targets, 0.2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_single_precision_is_close_to_double() -> None:
    leaves, targets = problem(6, 4, 16, 3000, 2, search=True)
    exact, _ = prototype_loss(given(leaves), targets, 0.1)
    expected = torch.autograd.grad(exact, leaves)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    targets = [t._replace(probabilities=t.probabilities.float()) for t in targets]
    total, _ = prototype_loss(given(single), targets, 0.1)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(total, single), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 8, 1500, 2), (3, 16, 20, 256, 2)])
def test_the_compiled_kernels_equal_the_torch_ones(shape: tuple[int, ...], recompute: bool) -> None:
    if not cpu.available():
        pytest.skip("the compiled loss was not built")
    leaves, targets = problem(*shape, search=True)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    targets = [t._replace(probabilities=by_prototype(t.probabilities)) for t in targets]
    results = []
    for kernels in (cpu, plain):
        total, terms = prototype_loss(given(single), targets, 0.2, kernels=kernels, recompute=recompute)
        results.append([total.detach(), terms, *torch.autograd.grad(total, single)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * theirs.abs().max().item())
    logits = by_prototype(torch.randn(shape[0], shape[1], shape[3]) * 3)
    grads = []
    for given_logits, kernels in ((logits, cpu), (logits.contiguous(), plain)):
        leaf = given_logits.detach().requires_grad_()
        total, _ = distillation_loss(leaf, targets, 0.2, kernels=kernels)
        grads.append(torch.autograd.grad(total, leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-6 * grads[1].abs().max().item())


def test_the_compiled_softmax_equals_torch_s_and_lets_no_nan_get_lost() -> None:
    if not cpu.available():
        pytest.skip("the compiled loss was not built")
    logits, center = by_prototype(10 * torch.randn(2, 3, 700)), torch.randn(700)
    expected = torch.softmax((logits.double() - center.double()) / 0.04, -1)
    torch.testing.assert_close(teacher_probabilities(logits, center, 0.04).double(), expected, rtol=1e-4, atol=1e-12)
    logits[1, 2, 600] = torch.nan
    found = teacher_probabilities(logits, None, 0.04)
    assert found[1, 2].isnan().all()
    assert found.isfinite().sum() == found.numel() - 700


def by_prototype(logits: Tensor) -> Tensor:
    """In single precision, in the memory order that the step has on CPUs."""
    return logits_in(torch.empty(logits.numel()), *logits.shape[:2], by_prototype=True).copy_(logits)


def test_half_precision_rows_and_autocast_are_computed_in_fp32() -> None:
    leaves, targets = problem(4, 2, 8, 500, 2, search=False)
    half = [leaf.detach().bfloat16().float().requires_grad_() for leaf in leaves]
    plain, _ = prototype_loss(given(half), targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = prototype_loss(given([half[0].bfloat16(), *half[1:]]), targets, 0.1)
    assert total.dtype == torch.float32
    assert torch.equal(total, plain)


def test_logits_equal_the_normalised_weight_s() -> None:
    torch.manual_seed(0)
    prototypes = Prototypes(6, 5000, train_gain=True)
    prototypes.gain.data.uniform_(0.5, 2.0)
    rows = torch.randn(3, 2, 6)
    expected = F.linear(rows, F.normalize(prototypes.direction, dim=1) * prototypes.gain)
    torch.testing.assert_close(HeadOutput(rows, prototypes()).logits(), expected.detach())


def test_prototypes_that_do_not_lend_their_storage_give_copies_with_the_same_gradients() -> None:
    leaves, targets = problem(4, 2, 3, 9, 2, search=False)
    gradients = []
    for lends in (True, False):
        prototypes = Prototypes(3, 9, train_gain=True).double()
        prototypes.direction.data.copy_(leaves[1].data)
        prototypes.lends_storage = lends
        weight = prototypes()
        assert (weight.direction.data_ptr() == prototypes.direction.data_ptr()) is lends
        prototype_loss(HeadOutput(leaves[0], weight), targets, 0.2)[0].backward()
        gradients.append((prototypes.direction.grad, prototypes.gain.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_triton_kernels_equal_the_torch_ones() -> None:
    """Where there is no GPU, Triton's interpreter runs them; it has to be chosen before they are defined."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.programs.triton_loss"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=240)


def test_triton_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from mokd.losses.kernels import triton

    constants = {"LOGITS": True, "TEACHERS": 2, "PAIRED": 2, "BY_ROW": True, "FIRST": 2, "TILE": 1024}
    counts = {"views", "batch", "count", "tiles"}
    for name in ("_observe", "_gradient"):
        kernel = getattr(triton, name)
        if not hasattr(kernel, "arg_names"):
            pytest.skip("the interpreter is chosen")
        names = kernel.arg_names
        types = {key: "fp32" if key.startswith("factor") else "*fp32" for key in names}
        types |= {key: "i32" for key in names if key in counts or key.endswith(("_view", "_image"))}
        types |= {"factor": "*fp32", "out": "*bf16", **dict.fromkeys(constants, "constexpr")}
        signature = {key: types[key] for key in names}
        values = {(names.index(key),): value for key, value in constants.items() if key in names}
        source = compiler.ASTSource(kernel, signature, constexprs=values)
        assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_uniform_student_against_any_target_costs_ln_k() -> None:
    probabilities = torch.softmax(torch.randn(2, 3, 50), -1)
    student = HeadOutput(torch.zeros(4, 3, 2), PrototypeWeight(torch.ones(50, 2), torch.ones(50, 1), torch.ones(50, 1)))
    _, terms = prototype_loss(student, [Target(probabilities, 1.0)], 0.1)
    assert terms[0].item() == pytest.approx(math.log(50), rel=1e-6)


def test_entropy_of_uniform_and_of_certain() -> None:
    assert entropy(torch.full((2, 8), 1 / 8)).tolist() == pytest.approx([math.log(8)] * 2)
    assert entropy(torch.eye(4)).tolist() == [0.0] * 4


def test_directions_start_as_a_linear_layer_s_weight_does() -> None:
    torch.manual_seed(0)
    prototypes, layer = Prototypes(100, 4000, train_gain=True), torch.nn.Linear(100, 4000, bias=False)
    for weight in (prototypes.direction, layer.weight):
        assert weight.abs().max().item() == pytest.approx(0.1, rel=1e-3)
        assert weight.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=1e-2)  # at every width
