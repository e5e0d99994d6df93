"""The fused loss on a block of logits, in torch operations that stay in place: the reference for the others.

A block is `[V, B, k]`: all student views of some images, over some prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokd.losses.kernels.targets import Cuts

BY_PROTOTYPE = False
TAKES_SCALE = False


def observe(z: Tensor, raw: Tensor, scale: float | Tensor, cuts: Cuts, dots: Tensor) -> tuple[Tensor, Tensor]:
    """What the loss needs of scaled logits: every row's largest one and its `sum(exp(z - largest))`, both `[V, B, 1]`.

    The logits are `scale * raw`; raw may be z, otherwise z is only written. scale: a number, or `[k]`.

    Every term's sum of `p z` over its comparisons is added to `dots`. Leaves `exp(z - largest)` in `z`. (Another
    implementation may cut a row into T tiles of equal size, each with a largest logit of its own: `[V, B, T]`.)
    """
    if raw is not z or isinstance(scale, Tensor) or scale != 1.0:
        torch.mul(raw, scale, out=z)
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
    x: Tensor, factor: Tensor, cuts: Cuts, dtype: torch.dtype, largest: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The gradient towards the logits, in `dtype`: `exp(z - largest) * factor` less all targets.

    x: these exponentials, or the logits z where `largest` is given; it is overwritten. factor, largest: `[V, B, 1]`.
    scale `[k]`: the logits are `scale * x`, and the gradient is that towards these x.
    """
    if largest is not None:
        if scale is not None:
            x.mul_(scale)
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
    if scale is not None:
        x.mul_(scale)
    return x.to(dtype)


def through_norm(towards: Tensor, v: Tensor, norm: Tensor, g: Tensor, unit: float, *, scaled: bool) -> Tensor:
    """Turns gradients towards weights `w = g v / |v|` `[k, C]`, in place, into those towards the directions v.

    unit: a factor on all of them. scaled: they have been multiplied by `g / |v|` already. Returns the gradients towards
    the gains `[k, 1]`.
    """
    # what lies along v changes the gain, the rest the direction
    radial = torch.linalg.vecdot(towards, v).unsqueeze(1)
    towards.addcmul_(v, radial / norm.square(), value=-1.0)
    towards.mul_(unit if scaled else g / norm * unit)
    return radial.div_(g if scaled else norm).mul_(unit)
