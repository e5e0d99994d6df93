"""The distillation losses over prototypes, as pure functions.

Cross-entropy is linear in its target. So a student row that is compared with several teacher views, of its own branch
and of others, needs one log-sum-exp and one dot product per kind of target, not one log-softmax per pair of views.

Shape letters: V student views, Q teacher views, B images per rank, K prototypes, R rows = V * B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What some student views are compared with, and the weight of that term in the branch's loss.

    paired: probabilities `[Q, B, K]` of teacher views; every student view meets all but the one of its own index.
    otherwise: probabilities `[V - first_view, B, K]`, one for every row of the student's views from `first_view` on.
    """

    probabilities: Tensor
    weight: float
    paired: bool = True
    first_view: int = 0


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is: a softmax over many prototypes is not safe in less."""
    return x if x.dtype == torch.float64 else x.float()


def teacher_probabilities(logits: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    """`softmax((t - center) / T)` over the last dimension, in fp32 or better; no gradient."""
    logits = at_least_fp32(logits.detach())
    if center is not None:
        logits = logits - center
    return torch.softmax(logits / temperature, dim=-1)


def distillation_loss(logits: Tensor, targets: Sequence[Target], temperature: float) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms, and every term by itself `[len(targets)]` (detached).

    For student logits `[V, B, K]`, one paired term is, written as loops,

        for q in range(Q):
            for v in range(V):
                if v != q:
                    loss += -(p[q] * log_softmax(s[v] / temperature)).sum(-1).mean(0)
        loss /= Q * V - Q

    and a term that is not paired is the mean over its rows of `-(p * log_softmax(s / temperature)).sum(-1)`.
    """
    scaled = at_least_fp32(logits) / temperature
    log_z = scaled.logsumexp(dim=-1)  # [V, B], shared by all terms
    values = [_paired(scaled, log_z, t) if t.paired else _by_row(scaled, log_z, t) for t in targets]
    terms = torch.stack(values)
    weights = torch.tensor([t.weight for t in targets], dtype=terms.dtype, device=terms.device)
    return (terms * weights).sum(), terms.detach()


def _paired(scaled: Tensor, log_z: Tensor, target: Target) -> Tensor:
    p = target.probabilities
    views, batch = log_z.shape
    teachers = p.shape[0]
    own = min(teachers, views)  # the student views that also are teacher views
    together = p.sum(dim=0)
    # every view meets the sum of all targets, less its own
    dot = (scaled * together).sum(dim=-1)
    dot = torch.cat([dot[:own] - (scaled[:own] * p[:own]).sum(dim=-1), dot[own:]])
    met = torch.full((views, 1), float(teachers), dtype=log_z.dtype, device=log_z.device)
    met[:own] -= 1.0
    pairs = teachers * views - own
    return (met * log_z - dot).sum() / (pairs * batch)


def _by_row(scaled: Tensor, log_z: Tensor, target: Target) -> Tensor:
    rows = scaled[target.first_view :]
    return (log_z[target.first_view :] - (rows * target.probabilities).sum(dim=-1)).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy in nats of distributions along the last dimension."""
    return torch.special.entr(probabilities).sum(dim=-1).mean()
