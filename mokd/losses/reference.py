"""The losses as one reads them in the paper (arXiv 2304.06461): plain torch, differentiated by autograd.

Nothing here trains a network. The fused losses are held to these functions, in float64, and the plain step of
`mokd bench step` is made of them. All take logits, features and weights as tensors; what a centre, a temperature or a
bank is at some step is for the caller to say. The search's cross-attention itself is `mokd.models.heads.THead`.

The four terms of branch i, with another branch j (section 3 of the paper):

    term          student side               teacher side                              compared by
    self_mlp      i's MLP head               i's teacher, MLP head                     paired_cross_entropy
    self_thead    i's T-Head                 i's teacher, T-Head                       paired_cross_entropy
    cross_mlp     i's MLP head               j's teacher, MLP head                     paired_cross_entropy
    cross_search  i's T-Head, local views    what i's queries find with j's T-Head     row_cross_entropy

    loss of i = self_mlp + self_thead + weight_i * (cross_mlp + cross_search)

Shape letters: V student views, Q teacher (global) views, L local views, B images, K prototypes or negatives; R rows,
D width of queries and keys, N positions of a G x G map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BranchLogits(NamedTuple):
    """What one branch says of a batch, and its centres: `student_*` `[V, B, K]`, `teacher_*` `[Q, B, K]`, `*_center`
    `[K]`.
    """

    student_mlp: Tensor
    student_t_head: Tensor
    teacher_mlp: Tensor
    teacher_t_head: Tensor
    mlp_center: Tensor
    t_head_center: Tensor


def four_terms(
    own: BranchLogits,
    others: Sequence[BranchLogits],
    found: Sequence[Tensor],
    *,
    own_temperature: float,
    cross_temperature: float,
    student_temperature: float = 0.1,
    center_search: bool = False,
) -> dict[str, Tensor]:
    """The terms of one branch; a branch without others has the two self terms.

    found: for every other branch the logits `[L, B, K]` of its teacher's T-Head, asked with this branch's queries of
    the local views. The cross terms are means over the other branches (the paper has one). center_search: whether
    the centre is taken from these logits too; the paper's search is without.
    """

    def paired(student: Tensor, teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
        return paired_cross_entropy(student, teacher_targets(teacher, center, temperature), student_temperature)

    terms = {
        "self_mlp": paired(own.student_mlp, own.teacher_mlp, own.mlp_center, own_temperature),
        "self_thead": paired(own.student_t_head, own.teacher_t_head, own.t_head_center, own_temperature),
    }
    if others:
        learned, searched = [], []
        for other, logits in zip(others, found, strict=True):
            learned.append(paired(own.student_mlp, other.teacher_mlp, other.mlp_center, cross_temperature))
            targets = teacher_targets(logits, other.t_head_center if center_search else None, cross_temperature)
            local = own.student_t_head[-logits.shape[0] :]
            searched.append(row_cross_entropy(local, targets, student_temperature))
        terms["cross_mlp"] = torch.stack(learned).mean()
        terms["cross_search"] = torch.stack(searched).mean()
    return terms


def teacher_targets(logits: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    """`softmax((t - center) / T)` over the prototypes, detached (DINO, arXiv 2104.14294, section 3.1)."""
    shifted = logits.detach() if center is None else logits.detach() - center
    return torch.softmax(shifted / temperature, dim=-1)


def paired_cross_entropy(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """H(teacher, student) over pairs of different views, for student logits `[V, B, K]` and targets `[Q, B, K]`.

        for q in range(Q):
            for v in range(V):
                if v != q:
                    for b in range(B):
                        loss += -sum(p[q, b, k] * log_softmax(s[v, b] / T)[k] for k in range(K)) / B
        loss /= the number of pairs, Q * V - min(Q, V)

    DINO's equations 2 and 3, as a mean.
    """
    scaled = student / temperature
    total, pairs = torch.zeros((), dtype=student.dtype, device=student.device), 0
    for q, target in enumerate(targets):
        for v, view in enumerate(scaled.unbind()):
            if v != q:
                total = total + _cross_entropy(target, view)
                pairs += 1
    return total / pairs


def row_cross_entropy(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """H(teacher, student) of views with a target each, for student logits `[L, B, K]` and targets `[L, B, K]`.

        for v in range(L):
            for b in range(B):
                loss += -sum(p[v, b, k] * log_softmax(s[v, b] / T)[k] for k in range(K)) / (L * B)

    The search's term: what a local view's query found is the target of that view alone.
    """
    scaled = student / temperature
    total = torch.zeros((), dtype=student.dtype, device=student.device)
    for target, view in zip(targets, scaled.unbind(), strict=True):
        total = total + _cross_entropy(target, view)
    return total / len(targets)


def _cross_entropy(target: Tensor, scaled: Tensor) -> Tensor:
    """The mean over images of `-sum_k p_k log_softmax(z)_k`; both `[B, K]`."""
    return torch.sum(-target * F.log_softmax(scaled, dim=-1), dim=-1).mean()


def next_center(center: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """The centre `[K]` after a step with teacher logits `[Q, B, K]`, B being the global batch (DINO, equation 4)."""
    return momentum * center + (1.0 - momentum) * teacher.mean(dim=(0, 1))


# The contrastive objective: momentum contrast within a branch (MoCo, arXiv 1911.05722, equation 1), and between
# branches the same against a key that is extracted, matched and aligned from what the other branch shows.


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """The loss `[R]` of unit vectors: queries and their keys `[R, D]` against negatives `[K, D]`.

    for r in range(R):
        logits = [q[r] . key[r]] + [q[r] . m[k] for k in range(K)]
        loss[r] = -log_softmax(logits / T)[0]
    """
    positive = (queries * keys).sum(dim=-1, keepdim=True)
    logits = torch.cat([positive, queries @ negatives.T], dim=-1) / temperature
    return -F.log_softmax(logits, dim=-1)[:, 0]


def extraction(dense: Tensor, kernel: Tensor) -> Tensor:
    """`e` `[R, N, D]`: a 3x3 convolution `[D, D, 3, 3]` over the other branch's map `[R, N, D]`, zeros around it.

    for y in range(G):
        for x in range(G):
            e[y, x] = sum(kernel[:, :, dy, dx] @ f[y + dy - 1, x + dx - 1] for dy in range(3) for dx in range(3))
    """
    grid = math.isqrt(dense.shape[1])
    padded = F.pad(dense.unflatten(1, (grid, grid)), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, dy : dy + grid, dx : dx + grid] @ kernel[:, :, dy, dx].T for dy in range(3) for dx in range(3)]
    return torch.stack(shifted).sum(dim=0).flatten(1, 2)


def matching(queries: Tensor, extracted: Tensor) -> Tensor:
    """`w` `[R, N]`: how much each position of `e` `[R, N, D]` matches the query `[R, D]`, which is detached here.

    for r in range(R):
        w[r] = softmax(over n, of cos(q[r], e[r, n]))
    """
    similarity = F.cosine_similarity(extracted, queries.detach().unsqueeze(1), dim=-1)
    return torch.softmax(similarity, dim=-1)


def alignment(
    weights: Tensor, extracted: Tensor, projected: Tensor, linear: Tensor, residual_weight: float = 0.5
) -> Tensor:
    """Keys `[R, D]` from what was matched, and the other branch's projections `[R, D]`; linear: `[D, D]`.

    for r in range(R):
        matched = sum(w[r, n] * e[r, n] for n in range(N))
        key[r] = unit(linear @ matched + residual_weight * projected[r])
    """
    matched = (weights.unsqueeze(-1) * extracted).sum(dim=1)
    return F.normalize(matched @ linear.T + residual_weight * projected, dim=-1)


# Distillation from a frozen network: similarities over a queue (SEED, arXiv 2101.04731), and regression.


def similarity_distillation(
    student: Tensor, teacher: Tensor, queue: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """The mean over rows of SEED's cross-entropy, for unit vectors `[R, D]` and a queue `[K, D]`, one row at a time.

    The teacher's own vector is the first anchor, then come those of the queue (equations 2 to 5).
    """
    losses = []
    for s, t in zip(student, teacher.detach(), strict=True):
        anchors = [t, *queue]
        taught = torch.stack([torch.dot(t, anchor) for anchor in anchors]) / teacher_temperature
        shown = torch.stack([torch.dot(s, anchor) for anchor in anchors]) / student_temperature
        p, q = taught.exp() / taught.exp().sum(), shown.exp() / shown.exp().sum()
        losses.append(-(p * q.log()).sum())
    return torch.stack(losses).mean()


def feature_regression(projected: Tensor, teacher: Tensor) -> Tensor:
    """The mean over rows and dimensions of the squared difference of `[R, D]`, the teacher's features standardised:
    each has mean 0 and variance 1 over its dimensions.
    """
    losses = []
    for x, t in zip(projected, teacher.detach(), strict=True):
        centred = t - t.mean()
        losses.append((x - centred / (centred.square().mean() + 1e-5).sqrt()).square().mean())
    return torch.stack(losses).mean()
