"""Losses towards the features of a frozen network: similarities over a queue, and regression.

Shape letters: R rows, K vectors of a queue, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mokd.losses.kernels.targets import at_least_fp32


def similarity_distillation(
    student: Tensor, teacher: Tensor, queue: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """The mean cross-entropy of similarity distributions (SEED, arXiv 2101.04731, equations 2 to 5).

    For unit vectors student and teacher `[R, D]` and a queue `[K, D]` of the teacher's former ones, written as loops,

        for r in range(R):
            anchors = [t[r]] + [queue[k] for k in range(K)]
            p = softmax([t[r] . a / T_teacher for a in anchors])
            loss += -sum(p[k] * log_softmax([s[r] . a / T_student for a in anchors])[k] for k in range(K + 1)) / R

    Gradients reach the student alone. Computed in fp32 or better; the queue may be stored in less.
    """
    with torch.autocast(student.device.type, enabled=False):  # 1 / temperature would magnify bf16's rounding
        student, teacher = at_least_fp32(student), at_least_fp32(teacher).detach()
        anchors = queue.to(student.dtype).T
        logits = torch.cat([(student * teacher).sum(dim=-1, keepdim=True), student @ anchors], dim=-1) / student_temp
        with torch.no_grad():
            own = torch.cat([teacher.square().sum(dim=-1, keepdim=True), teacher @ anchors], dim=-1)
            targets = torch.softmax(own / teacher_temp, dim=-1)
        # linear in the targets, which sum up to 1
        return (logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)).mean()


def standardised(features: Tensor) -> Tensor:
    """Every feature `[..., D]` with mean 0 and variance 1 over its own dimensions, in fp32 or better."""
    return F.layer_norm(at_least_fp32(features), features.shape[-1:])


def feature_regression(projected: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of projected and teacher features, both `[R, D]`.

        for r in range(R):
            for d in range(D):
                loss += (x[r, d] - t[r, d]) ** 2 / (R * D)

    Gradients reach the projected features alone. Computed in fp32 or better.
    """
    with torch.autocast(projected.device.type, enabled=False):
        return F.mse_loss(at_least_fp32(projected), at_least_fp32(teacher).detach())
