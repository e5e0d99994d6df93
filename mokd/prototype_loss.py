"""The fused prototype loss: from rows and prototypes to the loss and all its gradients, in blocks of prototypes.

With z = s w^T / T the scaled logits of a student row, L = logsumexp(z), p the combined target (the sum over all its
comparisons, with their weights) and m the sum of those weights, the row's loss is `m L - p z` and its gradient
`m softmax(z) - p`. Both are known once L is, so the gradients towards rows and prototypes are computed with the loss;
the backward pass only scales them. A first pass over blocks of prototypes finds L, a second one all else; between the
two the logits are kept, or computed again. Nothing of the size `[V, B, K]` outlives the function.

Shape letters: V student views, B images per rank, R rows = V * B, C width before the prototypes, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mokd import prototype_blocks
from mokd.losses import Target, at_least_fp32
from mokd.prototypes import HeadOutput, PrototypeWeight, product, product_types

# Logits per block. On a CPU they stay in the cores' second-level caches; on a GPU a block is large enough to fill it.
_CPU_BLOCK_BYTES_PER_THREAD = 640 << 10
_GPU_BLOCK_BYTES = 64 << 20
_GRANULE = 256


class Kernels(Protocol):
    """What is done to a block of scaled logits `[V, B, k]`, in place."""

    def log_sum_exp(self, z: Tensor) -> Tensor:
        """Of every row, over the block: `[V, B]`."""
        ...

    def gradient(
        self, z: Tensor, log_z: Tensor, mass: Tensor, targets: Sequence[tuple[Target, float]], start: int, dots: Tensor
    ) -> Tensor:
        """The gradient `[V, B, k]` towards z, which may be overwritten: `mass * exp(z - log_z)` less the targets.

        mass: `[V]`; targets: each with the factor of its comparisons; start: the block's first prototype;
        dots `[len(targets)]`: every term's sum of `p z` over comparisons is added to it.
        """
        ...


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
    `[R, K]` of them; default: on GPUs, where the second product costs little. kernels: for tests; the device's own.
    """
    on_gpu = student.rows.device.type == "cuda"
    recompute = on_gpu if recompute is None else recompute
    kernels = kernels or _kernels(on_gpu)
    rows, weight = student
    return _PrototypeLoss.apply(
        rows, weight.direction, weight.gain, weight.norm, tuple(targets), temperature, train_prototypes, recompute, kernels
    )


def _kernels(on_gpu: bool) -> Kernels:
    if on_gpu:
        try:
            from mokd import prototype_triton  # importing it imports Triton, which not every installation has
        except ImportError:
            return prototype_blocks
        return prototype_triton
    return prototype_blocks


class _PrototypeLoss(torch.autograd.Function):
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
        with torch.autocast(rows.device.type, enabled=False):
            work = _Work(rows, PrototypeWeight(direction, gain, norm), targets, temperature, recompute, kernels)
            work.find_log_sum_exp()
            wants = [wanted and train_prototypes for wanted in ctx.needs_input_grad[1:3]]
            ctx.gradients = work.differentiate(*wants)
            total, terms = work.values()
        ctx.mark_non_differentiable(terms)
        return total, terms

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
        return (*gradients, *[None] * 6)


class _Work:
    """One evaluation of the loss."""

    def __init__(
        self,
        rows: Tensor,
        weight: PrototypeWeight,
        targets: Sequence[Target],
        temperature: float,
        recompute: bool,
        kernels: Kernels,
    ) -> None:
        self.shape = rows.shape
        self.row_type = rows.dtype
        self.weight, self.targets, self.kernels = weight, targets, kernels
        self.inverse_temp = 1.0 / temperature
        self.dtype, accumulator = product_types(rows)
        self.rows = rows.flatten(0, 1).to(self.dtype)
        self.accumulator = accumulator
        count, prototypes = self.rows.shape[0], weight.direction.shape[0]
        self.block = _block_size(count, prototypes, rows.device, accumulator.itemsize)
        self.keeps = not recompute
        self.memory = torch.empty(
            count * (prototypes if self.keeps else self.block), dtype=accumulator, device=rows.device
        )
        views = rows.shape[0]
        self.coefficients = [target.coefficient(views) for target in targets]
        self.comparisons = [target.comparisons(views) for target in targets]
        mass = [
            sum(t.weight * c * n[view] for t, c, n in zip(targets, self.coefficients, self.comparisons, strict=True))
            for view in range(views)
        ]
        # in half precision gradients of 1e-8 would vanish; a power of two changes nothing else
        largest = max(mass, default=0.0)
        self.boost = 2.0 ** (13 - math.ceil(math.log2(largest))) if self.dtype.itemsize == 2 and largest > 0 else 1.0
        self.mass = torch.tensor([m * self.boost for m in mass], dtype=accumulator, device=rows.device)

    def find_log_sum_exp(self) -> None:
        """Of every row, `[V, B]`; by blocks, in a pass of its own."""
        parts = []
        for start, stop in self._blocks():
            weight = self.weight.scaled_block(start, stop, self.inverse_temp, self.dtype)
            parts.append(self.kernels.log_sum_exp(self._product(start, stop, weight)))
        self.log_z = torch.stack(parts).logsumexp(dim=0)

    def differentiate(self, for_direction: bool, for_gain: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients towards rows, direction and gain; the terms' dot products on the way."""
        v, g, norm = self.weight
        out_rows = torch.zeros_like(self.rows, dtype=self.accumulator)
        part = torch.empty_like(out_rows)
        out_v = torch.empty_like(v, dtype=self.accumulator) if for_direction else None
        out_g = torch.empty_like(g, dtype=self.accumulator) if for_gain else None
        scratch = torch.empty(self.block, v.shape[1], dtype=self.accumulator, device=v.device)
        weighed = [(t, t.weight * c * self.boost) for t, c in zip(self.targets, self.coefficients, strict=True)]
        self.dots = torch.zeros(len(self.targets), dtype=torch.float64, device=v.device)
        for start, stop in self._blocks():
            weight = self.weight.scaled_block(start, stop, self.inverse_temp, self.dtype)
            z = self._kept(start, stop) if self.keeps else self._product(start, stop, weight)
            towards_z = self.kernels.gradient(z, self.log_z, self.mass, weighed, start, self.dots)
            flat = towards_z.flatten(0, 1).to(self.dtype)
            product(flat, weight, out=part)
            out_rows += part
            if out_v is None and out_g is None:
                continue
            towards_w = scratch[: stop - start] if out_v is None else out_v[start:stop]
            product(flat.T, self.rows, out=towards_w)
            # w = g v / |v|: what lies along v changes the gain, the rest the direction
            radial = (towards_w * v[start:stop]).sum(dim=1, keepdim=True) / norm[start:stop]
            if out_g is not None:
                torch.mul(radial, self.inverse_temp / self.boost, out=out_g[start:stop])
            if out_v is not None:
                towards_w.addcmul_(v[start:stop], radial / norm[start:stop], value=-1.0)
                towards_w.mul_(g[start:stop] / norm[start:stop] * (self.inverse_temp / self.boost))
        return out_rows.div_(self.boost).to(self.row_type).view(self.shape), out_v, out_g

    def values(self) -> tuple[Tensor, Tensor]:
        """The weighted sum of the terms, and the terms `[len(targets)]`."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.dots.device}
        comparisons = torch.tensor(self.comparisons, **options)
        log_z = self.log_z.sum(dim=1, dtype=torch.float64)
        terms = (comparisons @ log_z - self.dots) * torch.tensor(self.coefficients, **options)
        total = (terms * torch.tensor([t.weight for t in self.targets], **options)).sum()
        return total.to(self.accumulator), terms.to(self.accumulator)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        prototypes = self.weight.direction.shape[0]
        for start in range(0, prototypes, self.block):
            yield start, min(start + self.block, prototypes)

    def _kept(self, start: int, stop: int) -> Tensor:
        """Memory for the logits of a block `[V, B, stop - start]`, its own or shared with all others."""
        count = self.rows.shape[0]
        first = start if self.keeps else 0
        return self.memory[count * first : count * (first + stop - start)].view(*self.shape[:2], stop - start)

    def _product(self, start: int, stop: int, weight: Tensor) -> Tensor:
        z = self._kept(start, stop)
        product(self.rows, weight.T, out=z.flatten(0, 1))
        return z


def _block_size(rows: int, prototypes: int, device: torch.device, itemsize: int) -> int:
    limit = _GPU_BLOCK_BYTES if device.type == "cuda" else _CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads()
    granules = limit // (rows * itemsize * _GRANULE)
    return min(max(granules, 1) * _GRANULE, prototypes)
