"""InfoNCE against a large set of negatives, without the matrix of all similarities.

Shape letters: R query rows, K negatives, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mokd.losses.kernels.targets import at_least_fp32

# of the negatives at one time: enough work for a matrix product, far less memory than all of them
CHUNK = 8192


def info_nce(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss of every row `[R]` and its largest similarity with a negative `[R]` (detached).

    For unit vectors `queries` and `positives` `[R, D]` and `negatives` `[K, D]`, written as loops,

        for r in range(R):
            logits = [q[r] . positives[r]] + [q[r] . negatives[k] for k in range(K)]
            loss[r] = -log_softmax(logits / temperature)[0]

    Gradients reach queries and positives, never the negatives. Computed in fp32 or better; the negatives may be stored
    in less.
    """
    with torch.autocast(queries.device.type, enabled=False):  # 1 / temperature would magnify bf16's rounding
        queries, positives = at_least_fp32(queries), at_least_fp32(positives)
        log_z, hardest = _NegativesLogSumExp.apply(queries, negatives, temperature)
        positive = (queries * positives).sum(dim=-1) / temperature
        # logsumexp over positive and negatives, less the positive
        return F.softplus(log_z - positive), hardest


class _NegativesLogSumExp(torch.autograd.Function):
    """`logsumexp(q . negatives / temperature)` of every row, and the largest product; logits made again going back."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        sums, highest = [], []
        for part in negatives.split(CHUNK):
            products = queries @ part.to(queries.dtype).T
            highest.append(products.amax(dim=-1))
            sums.append((products / temperature).logsumexp(dim=-1))
        log_z, hardest = torch.stack(sums).logsumexp(dim=0), torch.stack(highest).amax(dim=0)
        ctx.save_for_backward(queries, negatives, log_z)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(hardest)
        return log_z, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        queries, negatives, log_z = ctx.saved_tensors
        result = torch.zeros_like(queries)
        scale = (grad / ctx.temperature).unsqueeze(-1)
        for part in negatives.split(CHUNK):
            part = part.to(queries.dtype)
            shares = (queries @ part.T / ctx.temperature - log_z.unsqueeze(-1)).exp_()
            result.addmm_(shares.mul_(scale), part)
        return result, None, None
