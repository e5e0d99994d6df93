"""The distillation losses over prototypes: what students are compared with, and what every comparison weighs.

Cross-entropy is linear in its target. So a student row that is compared with several teacher views, of its own branch
and of others, needs one log-sum-exp and one combined target, not one log-softmax per pair of views.

Shape letters: V student views, Q teacher views, B images per rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What some student views are compared with, and the weight of that term in the branch's loss.

    paired: probabilities `[Q, B, K]` of teacher views; every student view meets all but the one of its own index:

        for q in range(Q):
            for v in range(V):
                if v != q:
                    loss += -(p[q] * log_softmax(s[v] / temperature)).sum(-1).mean(0)
        loss /= Q * V - min(Q, V)

    otherwise: probabilities `[V - first_view, B, K]`, one for every row of the student's views from `first_view` on;
    the term is the mean over these rows of `-(p * log_softmax(s / temperature)).sum(-1)`.
    """

    probabilities: Tensor
    weight: float
    paired: bool = True
    first_view: int = 0

    def coefficient(self, views: int) -> float:
        """Of a single comparison of a row in the term, the weight left aside."""
        if self.paired:
            teachers, batch = self.probabilities.shape[:2]
            return 1.0 / ((teachers * views - min(teachers, views)) * batch)
        return 1.0 / (self.probabilities.shape[0] * self.probabilities.shape[1])

    def comparisons(self, views: int) -> list[int]:
        """How many targets a row of each student view meets."""
        if self.paired:
            teachers = self.probabilities.shape[0]
            return [teachers - 1 if view < teachers else teachers for view in range(views)]
        return [int(view >= self.first_view) for view in range(views)]


class Cut(NamedTuple):
    """A target as a block of logits `[V, b, k]` meets it: `[Q, b, k]`, or `[V - first_view, b, k]`.

    factor: of a single comparison in the loss.
    """

    probabilities: Tensor
    factor: float
    paired: bool
    first_view: int

    def own(self, z: Tensor) -> slice:
        """The views that are students and teachers both."""
        return slice(min(self.probabilities.shape[0], z.shape[0]))


Cuts = Sequence[Cut]


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is: a softmax over many prototypes is not safe in less."""
    return x if x.dtype == torch.float64 else x.float()


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of distributions along the last dimension."""
    return torch.special.entr(probabilities).sum(dim=-1)
