"""The loss of one branch by itself: four terms over two heads, from logits and targets to the logits' gradients.

Ours computes loss and gradients in one go; the literal one (`mokd.losses.reference`) is a log-softmax for every pair of
views (62 of them at 2 + 8 views), differentiated by autograd. Products with prototypes and the targets' softmax are in
neither.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_ours import synchronise
from data_pipeline.core.errors import DataError
from mokd.config import RunConfig
from mokd.losses.kernels.targets import Target
from mokd.losses.prototype_loss import distillation_loss
from mokd.losses.prototypes import logits_in
from mokd.losses.reference import paired_cross_entropy, row_cross_entropy


def run(config: RunConfig, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median milliseconds of both, alternating, and their ratio. DataError when gradients differ."""
    views, temperature = config.views, config.objective.student_temp
    v, q, b, k = views.count, views.global_crops.count, config.optim.global_batch, config.objective.prototypes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    plain = [draw(v, b, k).mul_(0.1).requires_grad_() for _ in range(2)]
    self_mlp, self_thead, cross_mlp = (Target(torch.softmax(draw(q, b, k), -1), w) for w in (1.0, 1.0, 0.1))
    search = Target(torch.softmax(draw(v - q, b, k), -1), 0.1, paired=False, first_view=q)
    targets = [[self_mlp, cross_mlp], [self_thead, search]]
    heads = [laid_out(logits.detach()).requires_grad_() for logits in plain]
    met = [[t._replace(probabilities=laid_out(t.probabilities)) for t in terms] for terms in targets]

    def ours() -> Tensor:
        return sum(distillation_loss(h, t, temperature)[0] for h, t in zip(heads, met, strict=True))

    def literal() -> Tensor:
        total = torch.zeros((), device=device)
        for logits, terms in zip(plain, targets, strict=True):
            for target in terms:
                p = target.probabilities
                loss = paired_cross_entropy if target.paired else row_cross_entropy
                total = total + target.weight * loss(logits[target.first_view :], p, temperature)
        return total

    contenders = {"ours": (ours, heads), "literal": (literal, plain)}
    found = {name: torch.autograd.grad(loss(), leaves) for name, (loss, leaves) in contenders.items()}
    for mine, theirs in zip(found["ours"], found["literal"], strict=True):
        if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())):
            raise DataError("benchmark: fused and literal loss have different gradients: not the same work")
    del found
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(max(rounds, 3)):
        for name, (loss, leaves) in contenders.items():
            synchronise(device)
            began = time.perf_counter()
            torch.autograd.grad(loss(), leaves)
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {"ms": ms, "ratio": ms["literal"] / ms["ours"]}


def laid_out(logits: Tensor) -> Tensor:
    """A copy of `[V, B, K]` in the memory order of our step."""
    memory = torch.empty(logits.numel(), device=logits.device)
    return logits_in(memory, *logits.shape[:2], by_prototype=logits.device.type == "cpu").copy_(logits)
