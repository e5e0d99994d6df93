"""Schedules as closed forms of the step or the epoch: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 towards `end` at `steps` along half a cosine; constant afterwards."""
    progress = min(step / steps, 1.0) if steps > 0 else 1.0
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(step: int, steps: int, warmup_steps: int, peak: float, end: float) -> float:
    """Linear from 0 to `peak` over `warmup_steps`, then a cosine to `end` over what is left of `steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return cosine(step - warmup_steps, steps - warmup_steps, peak, end)


def teacher_temperature(epoch: int, warmup_epochs: int, start: float, end: float) -> float:
    """Linear from `start` in the first epoch to `end` in the last of the warm-up, constant afterwards."""
    if epoch >= warmup_epochs:
        return end
    return start + (end - start) * epoch / max(warmup_epochs - 1, 1)
