"""A target that all teachers make together, a branch's own among them.

Shape letters: Q teacher views, B images per rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mokd.losses.teacher_probabilities import softmax


class Ensemble:
    """Adds up the teachers' centred logits `[Q, B, K]` of one batch.

    translate: logits of a branch over the prototypes as the first branch numbers them.
    """

    def __init__(self, translate: Callable[[Tensor, int], Tensor]) -> None:
        self._translate, self._count = translate, 0
        self._total: Tensor | None = None

    def add(self, branch: int, logits: Tensor, center: Tensor) -> None:
        """Takes a branch's logits in, less its centre `[K]`; they stay as they are."""
        centred = self._translate(torch.sub(logits, center), branch)
        self._total = centred if self._total is None else self._total.add_(centred)
        self._count += 1

    def probabilities(self, temperature: float) -> Tensor:
        """The softmax of the mean over `temperature`, in the first branch's numbering; once, in the sum's memory."""
        assert self._total is not None
        total, self._total = self._total, None
        return softmax(total.div_(self._count * temperature))
