"""The fused prototype loss: from rows and prototypes, or from logits, to the loss and all its gradients.

It equals `mokd.losses.reference`, which is the one to read for what is computed. With z the scaled logits of a student
row, L = logsumexp(z), p the combined target (the sum over all its comparisons, with their weights) and m the sum of
those weights, the row's loss is `m L - p z` and its gradient `m softmax(z) - p`. Both are known once L is. So the
forward pass that autograd calls computes the gradients too, while the logits are at hand; the backward pass scales
them:

    forward:   first pass   for every block of prototypes: z, its share of L and of every term's `p z`
               second pass  for every block of prototypes: `m softmax(z) - p`, and from it the gradients towards
                            rows, directions and gains, which are kept in place of z
    backward:  gradients * the gradient of the loss (1, or the loss scale of fp16)

Shape letters: V student views, B images per rank, R rows = V * B, C width before the prototypes, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_pipeline.core.triton_support import why_no_triton
from mokd.distributed.host_copy import constant
from mokd.losses.kernels import cpu, onednn, plain
from mokd.losses.kernels.scratch import empty
from mokd.losses.kernels.targets import Cut, Cuts, Target, at_least_fp32
from mokd.losses.prototypes import HeadOutput, PrototypeWeight, logits_in, product, product_types

# Logits per block: on a CPU few enough for the last-level cache, but not fewer, or threads meet too often; on a GPU
_CPU_BLOCK_BYTES_PER_THREAD = 1280 << 10
_GPU_BLOCK_BYTES = 64 << 20
_GRANULE = 256


class Kernels(Protocol):
    """What is done to a block of logits: see `mokd.losses.kernels.plain`.

    BY_PROTOTYPE: how it should lie in memory. TAKES_SCALE: rather scales logits and gradients than be given products
    with scaled weights.
    """

    BY_PROTOTYPE: bool
    TAKES_SCALE: bool

    def observe(self, z: Tensor, raw: Tensor, scale: float | Tensor, cuts: Cuts, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Takes notice of logits."""

    def gradient(
        self, x: Tensor, factor: Tensor, cuts: Cuts, dtype: torch.dtype, largest: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """The gradient towards them."""

    def through_norm(self, towards: Tensor, v: Tensor, norm: Tensor, g: Tensor, unit: float, *, scaled: bool) -> Tensor:
        """From gradients towards weights to those towards directions and gains."""


def prototype_loss(
    student: HeadOutput,
    targets: Sequence[Target],
    temperature: float,
    *,
    train_prototypes: bool = True,
    recompute: bool | None = None,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms, and every term by itself `[len(targets)]` (detached).

    train_prototypes: False computes no gradient for them. recompute: compute the logits twice instead of keeping
    `[R, K]` of them meanwhile; default: on GPUs, where a second product costs little. kernels: default: the device's.
    """
    on_gpu = student.rows.device.type == "cuda"
    options = (train_prototypes, on_gpu if recompute is None else recompute, kernels or _kernels(on_gpu))
    return _PrototypeLossWithGradients.apply(student.rows, *student.prototypes, tuple(targets), temperature, *options)


def distillation_loss(
    logits: Tensor, targets: Sequence[Target], temperature: float, *, kernels: Kernels | None = None
) -> tuple[Tensor, Tensor]:
    """As `prototype_loss`, for student logits `[V, B, K]` that exist already."""
    kernels = kernels or _kernels(logits.device.type == "cuda")
    return _DistillationLossWithGradients.apply(logits, tuple(targets), temperature, kernels)


def _kernels(on_gpu: bool) -> Kernels:
    if not on_gpu:
        return cpu
    if why_no_triton() is not None:
        return plain
    from mokd.losses.kernels import triton  # importing it imports Triton, which not every installation has

    return triton


class _Terms:
    """The terms of one evaluation: the weights of their comparisons, and their values from what blocks have shown."""

    def __init__(self, targets: Sequence[Target], views: int, device: torch.device) -> None:
        self.targets = targets
        self.coefficients = [target.coefficient(views) for target in targets]
        self.comparisons = [target.comparisons(views) for target in targets]
        terms = list(zip(targets, self.coefficients, self.comparisons, strict=True))
        self.mass = [sum(t.weight * c * n[view] for t, c, n in terms) for view in range(views)]
        self.dots = torch.zeros(len(targets), dtype=torch.float64, device=device)

    def cut(self, index: tuple[Any, ...], scale: float) -> list[Cut]:
        """The targets as a block of logits meets them; a comparison weighs `scale` times what it does in the loss."""
        pairs = zip(self.targets, self.coefficients, strict=True)
        return [Cut(t.probabilities[index], t.weight * c * scale, t.paired, t.first_view) for t, c in pairs]

    def mass_of_rows(self, scale: float, like: Tensor) -> Tensor:
        """The sum of the weights of a row's comparisons, times `scale`: `[V, 1, 1]`."""
        return constant(tuple(m * scale for m in self.mass), like.dtype, like.device).view(-1, 1, 1)

    def values(self, log_z: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the terms, and the terms `[len(targets)]`, for `logsumexp(z)` `[V, B]`."""
        exact = partial(constant, dtype=torch.float64, device=log_z.device)
        comparisons = torch.stack([exact(tuple(map(float, n))) for n in self.comparisons])
        terms = (comparisons @ log_z.sum(dim=1, dtype=torch.float64) - self.dots) * exact(tuple(self.coefficients))
        total = (terms * exact(tuple(t.weight for t in self.targets))).sum()
        return total.to(log_z.dtype), terms.to(log_z.dtype)


class _GradientsFromForward(torch.autograd.Function):
    """A function whose forward pass computes its gradients too, as if the loss had gradient 1, into `ctx.gradients`."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # scaled in place, and handed over: a second backward pass has nothing left to scale
        if ctx.gradients is None:
            raise RuntimeError("the prototype loss can be differentiated once")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_total.device.type != "cpu" or grad_total != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_total)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


class _PrototypeLossWithGradients(_GradientsFromForward):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        direction: Tensor,
        gain: Tensor,
        norm: Tensor,
        targets: tuple[Target, ...],
        temperature: float,
        train_prototypes: bool,
        recompute: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        types = product_types(rows)  # asked while autocast is on
        with torch.autocast(rows.device.type, enabled=False):
            weight = PrototypeWeight(direction, gain, norm)
            passes = _TwoPasses(rows, weight, targets, temperature, recompute, kernels, types)
            passes.find_log_z()
            for_direction, for_gain = (wanted and train_prototypes for wanted in ctx.needs_input_grad[1:3])
            ctx.gradients = passes.gradients(for_direction=for_direction, for_gain=for_gain)
            total, terms = passes.terms.values(passes.log_z)
        ctx.mark_non_differentiable(terms)
        return total, terms


class _TwoPasses:
    """Over rows and prototypes, in blocks of prototypes: the first pass finds L, the second one the gradients.

    Between the two, exponentials of all logits are kept, or the logits are computed again. The logits of a block are
    `s w^T / temperature`, with `w = g v / |v|`.
    """

    def __init__(
        self,
        rows: Tensor,
        weight: PrototypeWeight,
        targets: Sequence[Target],
        temperature: float,
        recompute: bool,
        kernels: Kernels,
        types: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.shape, self.row_type = rows.shape, rows.dtype
        self.weight, self.kernels, self.recompute = weight, kernels, recompute
        self.inverse_temp = 1.0 / temperature
        # half precision enters by rows and prototypes alone; logits and sums are of the second type
        self.dtype, self.accumulator = types
        self.rows = rows.flatten(0, 1).to(self.dtype)
        self.terms = _Terms(targets, rows.shape[0], rows.device)
        count, prototypes = self.rows.shape[0], weight.direction.shape[0]
        step = _block_size(count, prototypes, rows.device, self.accumulator.itemsize)
        self.blocks = [(start, min(start + step, prototypes)) for start in range(0, prototypes, step)]
        self.memory = empty([count * (step if recompute else prototypes)], self.accumulator, rows.device)
        # either the logits are scaled, by `g / |v| / temperature` of every prototype, or the directions are, block by
        # block; a gain of zero would hide its own gradient from the first way
        self.scale: Tensor | None = None
        if kernels.TAKES_SCALE and weight.direction.dtype == self.dtype and bool((weight.gain != 0.0).all()):
            self.scale = weight.scale(slice(None), self.inverse_temp).flatten()
        else:
            self.scaled = torch.empty(step, weight.direction.shape[1], dtype=self.dtype, device=rows.device)
        self.by_convolution = kernels.BY_PROTOTYPE and onednn.suits(self.rows, weight.direction)
        self.seen: list[Tensor] = []  # the largest logit of every row, by block

    def find_log_z(self) -> None:
        """The first pass: L of every row `[V, B]`, and the terms' dot products."""
        sums = []
        for start, stop in self.blocks:
            raw = self._logits(start, stop, self._weight(start, stop))
            z = self._memory(start, stop) if self.by_convolution else raw
            scale = 1.0 if self.scale is None else self.scale[start:stop]
            cuts = self.terms.cut((..., slice(start, stop)), 1.0)
            largest, total = self.kernels.observe(z, raw, scale, cuts, self.terms.dots)
            self.seen.append(largest)
            sums.append(total)
        self.log_z = (torch.cat(self.seen, dim=-1) + torch.cat(sums, dim=-1).log_()).logsumexp(dim=-1)

    def gradients(self, *, for_direction: bool, for_gain: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The second pass: the gradients towards rows, direction and gain, for a loss of gradient 1."""
        v, g, norm = self.weight
        boost = self._boost()
        scaled = self.scale is not None
        unit = 1.0 / boost if scaled else self.inverse_temp / boost
        mass = self.terms.mass_of_rows(boost, self.log_z)
        out_rows = torch.zeros_like(self.rows, dtype=self.accumulator)
        part = torch.empty_like(out_rows)
        out_v = empty(v.shape, self.accumulator, v.device) if for_direction or for_gain else None
        out_g = torch.empty_like(g, dtype=self.accumulator) if for_gain else None
        for (start, stop), largest in zip(self.blocks, self.seen, strict=True):
            weight = self._weight(start, stop)
            x = self._logits(start, stop, weight) if self.recompute else self._memory(start, stop)
            factor = (largest - self.log_z.unsqueeze(-1)).exp_().mul_(mass)
            cuts = self.terms.cut((..., slice(start, stop)), boost)
            scale = None if self.scale is None else self.scale[start:stop]
            given = (largest if self.recompute else None, scale)
            towards_z = self.kernels.gradient(x, factor, cuts, self.dtype, *given).flatten(0, 1)
            if self.by_convolution:
                wanted = out_v is not None
                part, towards_v = onednn.gradients(towards_z.T, self.rows, weight, for_directions=wanted)
            else:
                product(towards_z, weight, out=part)
            out_rows += part
            if out_v is None:
                continue
            if self.by_convolution:
                assert towards_v is not None
                out_v[start:stop] = towards_v
            else:
                product(towards_z.T, self.rows, out=out_v[start:stop])
            parameters = (v[start:stop], norm[start:stop], g[start:stop])
            towards_g = self.kernels.through_norm(out_v[start:stop], *parameters, unit, scaled=scaled)
            if out_g is not None:
                out_g[start:stop] = towards_g
        return out_rows.div_(boost).to(self.row_type).view(self.shape), out_v, out_g

    def _weight(self, start: int, stop: int) -> Tensor:
        """What rows are multiplied with."""
        if self.scale is not None:
            return self.weight.direction[start:stop]
        return self.weight.scaled_block(start, stop, self.inverse_temp, out=self.scaled)

    def _logits(self, start: int, stop: int, weight: Tensor) -> Tensor:
        if self.by_convolution:
            return logits_in(onednn.logits(self.rows, weight).view(-1), *self.shape[:2], by_prototype=True)
        z = self._memory(start, stop)
        product(self.rows, weight.T, out=z.flatten(0, 1))
        return z

    def _memory(self, start: int, stop: int) -> Tensor:
        """Of a block's logits `[V, B, stop - start]`: its own, or shared with all other blocks."""
        count = self.rows.shape[0]
        first = 0 if self.recompute else count * start
        memory = self.memory[first : first + count * (stop - start)]
        return logits_in(memory, *self.shape[:2], by_prototype=self.kernels.BY_PROTOTYPE)

    def _boost(self) -> float:
        """A power of two on all gradients on their way: in half precision those of 1e-8 would vanish."""
        largest = max(self.terms.mass, default=0.0)
        if self.dtype.itemsize > 2 or largest <= 0.0:
            return 1.0
        return 2.0 ** (13 - math.ceil(math.log2(largest)))


class _DistillationLossWithGradients(_GradientsFromForward):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: tuple[Target, ...], temperature: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """On GPUs some images at a time: what a block has shown is still in the cache when its gradient is due."""
        terms = _Terms(targets, logits.shape[0], logits.device)
        memory = empty([logits.numel()], at_least_fp32(logits[:0]).dtype, logits.device)
        out = logits_in(memory, *logits.shape[:2], by_prototype=kernels.BY_PROTOTYPE)
        mass = terms.mass_of_rows(1.0 / temperature, out)
        log_z = []
        for images in _images(logits):
            z, cuts = out[:, images], terms.cut((slice(None), images), 1.0)
            largest, total = kernels.observe(z, logits[:, images], 1.0 / temperature, cuts, terms.dots)
            log_z.append((largest + total.log()).logsumexp(dim=-1))
            factor = (largest - log_z[-1].unsqueeze(-1)).exp_().mul_(mass)
            kernels.gradient(z, factor, terms.cut((slice(None), images), 1.0 / temperature), z.dtype, None, None)
        ctx.gradients = (out.to(logits.dtype),)
        total, by_term = terms.values(torch.cat(log_z, dim=1))
        ctx.mark_non_differentiable(by_term)
        return total, by_term


def _images(logits: Tensor) -> Iterator[slice]:
    views, batch, prototypes = logits.shape
    on_gpu = logits.device.type == "cuda"
    step = max(1, _GPU_BLOCK_BYTES // (views * prototypes * logits.dtype.itemsize)) if on_gpu else batch
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _block_size(rows: int, prototypes: int, device: torch.device, itemsize: int) -> int:
    limit = _GPU_BLOCK_BYTES if device.type == "cuda" else _CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads()
    granules = limit // (rows * itemsize * _GRANULE)
    return min(max(granules, 1) * _GRANULE, prototypes)
