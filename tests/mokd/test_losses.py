from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mokd.losses import Target, distillation_loss, entropy, teacher_probabilities

torch.set_default_dtype(torch.float32)


def literal_paired(
    student: Tensor, teacher: Tensor, center: Tensor, teacher_temp: float, student_temp: float
) -> Tensor:
    """H(teacher, student) of the method, one pair of views, one image, one prototype at a time."""
    views, batch, prototypes = student.shape
    pair_means = []
    for q in range(teacher.shape[0]):
        for v in range(views):
            if v == q:
                continue
            total = torch.zeros((), dtype=student.dtype)
            for b in range(batch):
                centred = [(teacher[q, b, k] - center[k]) / teacher_temp for k in range(prototypes)]
                scaled = [student[v, b, k] / student_temp for k in range(prototypes)]
                t_norm = sum(torch.exp(c - max(centred)) for c in centred)
                s_norm = max(scaled) + torch.log(sum(torch.exp(s - max(scaled)) for s in scaled))
                for c, s in zip(centred, scaled, strict=True):
                    total = total - torch.exp(c - max(centred)) / t_norm * (s - s_norm)
            pair_means.append(total / batch)
    return sum(pair_means) / len(pair_means)


def literal_rows(student: Tensor, probabilities: Tensor, student_temp: float) -> Tensor:
    rows = []
    for v in range(student.shape[0]):
        for b in range(student.shape[1]):
            rows.append(-(probabilities[v, b] * torch.log_softmax(student[v, b] / student_temp, dim=-1)).sum())
    return sum(rows) / len(rows)


@pytest.mark.parametrize(("views", "teachers", "batch", "prototypes"), [(10, 2, 3, 7), (2, 2, 1, 5), (5, 3, 2, 11)])
def test_paired_term_equals_the_literal_loop(views: int, teachers: int, batch: int, prototypes: int) -> None:
    generator = torch.Generator().manual_seed(views * 31 + batch)
    student = torch.randn(views, batch, prototypes, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(teachers, batch, prototypes, generator=generator, dtype=torch.float64)
    center = torch.randn(prototypes, generator=generator, dtype=torch.float64)
    expected = literal_paired(student, teacher, center, 0.05, 0.1)
    (expected_gradient,) = torch.autograd.grad(expected, student)

    target = Target(teacher_probabilities(teacher, center, 0.05), 1.0)
    total, terms = distillation_loss(student, [target], 0.1)
    (gradient,) = torch.autograd.grad(total, student)

    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms[0], expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


def test_weighted_sum_of_terms_and_rows_of_local_views() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 2, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    first, second = (torch.randn(2, 2, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    found = torch.softmax(torch.randn(4, 2, 9, generator=generator, dtype=torch.float64), -1)
    zero = torch.zeros(9, dtype=torch.float64)
    expected = [
        literal_paired(student, first, zero, 0.07, 0.1),
        literal_paired(student, second, zero, 0.04, 0.1),
        literal_rows(student[2:], found, 0.1),
    ]
    weights = (1.0, 0.3, 0.7)
    targets = [
        Target(teacher_probabilities(first, None, 0.07), weights[0]),
        Target(teacher_probabilities(second, None, 0.04), weights[1]),
        Target(found, weights[2], paired=False, first_view=2),
    ]
    total, terms = distillation_loss(student, targets, 0.1)
    literal = sum(w * e for w, e in zip(weights, expected, strict=True))
    torch.testing.assert_close(total, literal, rtol=1e-9, atol=0)
    torch.testing.assert_close(terms, torch.stack(expected).detach(), rtol=1e-9, atol=0)
    for ours, theirs in zip(torch.autograd.grad(total, student), torch.autograd.grad(literal, student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_uniform_student_against_any_target_costs_ln_k() -> None:
    probabilities = torch.softmax(torch.randn(2, 3, 50), -1)
    _, terms = distillation_loss(torch.zeros(4, 3, 50), [Target(probabilities, 1.0)], 0.1)
    assert terms[0].item() == pytest.approx(math.log(50), rel=1e-6)


def test_half_precision_logits_are_computed_in_fp32() -> None:
    logits = 30 * torch.randn(4, 2, 1000)
    target = Target(torch.softmax(torch.randn(2, 2, 1000), -1), 1.0)
    total, _ = distillation_loss(logits.bfloat16(), [target], 0.1)
    exact, _ = distillation_loss(logits.bfloat16().double(), [Target(target.probabilities.double(), 1.0)], 0.1)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)


def test_entropy_of_uniform_and_of_certain() -> None:
    assert entropy(torch.full((2, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert entropy(torch.eye(4)).item() == 0.0
