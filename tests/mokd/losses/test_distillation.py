"""Distillation's losses against the loops of the reference, in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mokd.losses import reference
from mokd.losses.distillation import feature_regression, similarity_distillation, standardised


def rows(count: int, seed: int, *, unit: bool = True) -> torch.Tensor:
    values = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=-1) if unit else 3.0 * values + 1.0


@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.2, 0.01), (0.1, 0.07)])
def test_similarity_distillation_is_the_loop(student_temp: float, teacher_temp: float) -> None:
    student, teacher, queue = rows(5, 0).requires_grad_(), rows(5, 1).requires_grad_(), rows(9, 2)
    expected = reference.similarity_distillation(student, teacher, queue, student_temp, teacher_temp)
    (gradient,) = torch.autograd.grad(expected, student)
    found = similarity_distillation(student, teacher, queue, student_temp, teacher_temp)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-9, atol=1e-12)
    assert teacher.grad is None


def test_similarity_distillation_by_hand() -> None:
    """One row and one vector in the queue, at right angles: the teacher says (1, 0) / T, the student (0, 1) / T."""
    teacher, queue = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    found = similarity_distillation(queue, teacher, queue, 0.5, 1.0)
    p, e = torch.tensor([1.0, 0.0]).softmax(0).double(), torch.tensor([0.0, 2.0]).log_softmax(0).double()
    torch.testing.assert_close(found, -(p * e).sum(), rtol=1e-6, atol=0)


def test_feature_regression_is_the_loop() -> None:
    projected, teacher = rows(5, 0, unit=False).requires_grad_(), rows(5, 1, unit=False)
    expected = reference.feature_regression(projected, teacher)
    (gradient,) = torch.autograd.grad(expected, projected)
    found = feature_regression(projected, standardised(teacher))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(projected.grad, gradient, rtol=1e-9, atol=1e-12)
