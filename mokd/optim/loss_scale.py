"""Loss scaling for fp16: small gradients are lifted above what the format can hold, and overflows are noticed.

The scale is one branch's own: the other branches' steps do not depend on it. Deciding whether a step is skipped takes
one host read a step for all branches together; bf16 needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mokd.distributed.process_group import all_reduce_max

GROWTH, BACKOFF = 2.0, 0.5
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The factor on a branch's loss; halved at an overflow, doubled after `interval` steps without one."""

    scale: float = 2.0**16
    steps: int = 0
    interval: int = 2000

    def update(self, overflowed: bool) -> None:
        """Takes notice of a step."""
        self.steps = 0 if overflowed else self.steps + 1
        if overflowed:
            self.scale *= BACKOFF
        elif self.steps >= self.interval:
            self.scale, self.steps = min(self.scale * GROWTH, LARGEST), 0

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"scale": torch.tensor(self.scale, dtype=torch.float64), "steps": torch.tensor(self.steps)}

    def load_state_tensors(self, read: Callable[[str], Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        self.scale, self.steps = float(read("scale")), int(read("steps"))


@torch.no_grad()
def any_overflow(gradients: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Whether any element of each of several lists of gradients is infinite or NaN on any rank; the same everywhere."""
    # a rank's piece may be empty, which has no largest element
    norms = [torch._foreach_norm([g for g in own if g.numel()], torch.inf) for own in gradients]
    found = torch.stack([~torch.stack(largest).isfinite().all() for largest in norms])
    flags = all_reduce_max(found.to(torch.int32))  # a rank may hold only pieces
    return [bool(flag) for flag in flags.tolist()]
