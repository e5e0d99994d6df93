"""The fused loss on a block of logits, in torch operations that stay in place and, on CPUs, in the cache.

A block is `[V, B, k]`: all student views of some images, over some prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mokd.losses import Cut


def observe(z: Tensor, cuts: Sequence[Cut], dots: Tensor) -> tuple[Tensor, Tensor]:
    """What the loss needs of scaled logits: every row's largest one and its `sum(exp(z - largest))`, both `[V, B, 1]`.

    Every term's sum of `p z` over its comparisons is added to `dots`. Leaves `exp(z - largest)` in `z`. (Another
    implementation may cut a row into T tiles of equal size, each with a largest logit of its own: `[V, B, T]`.)
    """
    all_views = z.sum(dim=0) if any(cut.paired for cut in cuts) else z
    for i, cut in enumerate(cuts):
        p, own = cut.probabilities, cut.own(z)
        if cut.paired:
            # every view meets the sum of all targets, less its own
            dots[i] += (all_views * p.sum(dim=0)).sum() - (z[own] * p[own]).sum()
        else:
            dots[i] += (z[cut.first_view :] * p).sum()
    largest = z.amax(dim=-1, keepdim=True)
    z.sub_(largest).exp_()
    return largest, z.sum(dim=-1, keepdim=True)


def gradient(
    x: Tensor, factor: Tensor, cuts: Sequence[Cut], dtype: torch.dtype, largest: Tensor | None = None
) -> Tensor:
    """The gradient towards the logits, in `dtype`: `exp(z - largest) * factor` less all targets.

    x: these exponentials, or the logits z where `largest` is given; it is overwritten. factor, largest: `[V, B, 1]`.
    """
    if largest is not None:
        x.sub_(largest).exp_()
    x.mul_(factor)
    paired = [cut for cut in cuts if cut.paired]
    if paired:
        combined = paired[0].probabilities * paired[0].factor
        for cut in paired[1:]:
            combined.add_(cut.probabilities, alpha=cut.factor)
        own = paired[0].own(x)
        x.sub_(combined.sum(dim=0))
        x[own].add_(combined[own])
    for cut in cuts:
        if not cut.paired:
            x[cut.first_view :].sub_(cut.probabilities, alpha=cut.factor)
    return x.to(dtype)
