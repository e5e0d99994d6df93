"""Linear probes: many learning rates at once on the same features.

Shape letters: B images of a batch, D width, C classes, R learning rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.sampling.order import Int64Array, epoch_order
from mokd.evaluation.cache import CachedFeatures
from mokd.optim.schedules import cosine

MOMENTUM = 0.9
FIRST_DEVIATION = 0.01
BASE_BATCH = 256
BLOCK = 8192

# features `[B, D]` of one batch by every network, and the labels `[B]`
Batch = tuple[list[Tensor], Tensor]


class Heads:
    """R linear classifiers in one tensor, which differ in their learning rate alone: R probes for one matrix product.

    SGD with momentum 0.9 and no decay. rates: `[R]`, peaks. seed: of first weights, normal with deviation 0.01 and the
    same for every rate, as the published probes have them; without it zeros, which for a convex problem are as good as
    any. The bias starts at 0. weight, velocity: `[D + 1, R * C]`, the last row is the bias.
    """

    def __init__(
        self, rates: Sequence[float], width: int, classes: int, device: torch.device, seed: int | None = None
    ) -> None:
        self.shape = (len(rates), width + 1, classes)
        self._rates = torch.tensor(rates, device=device).repeat_interleave(classes)
        self.weight = torch.zeros(width + 1, len(rates) * classes, device=device)
        if seed is not None:
            first = FIRST_DEVIATION * torch.randn(width, classes, generator=torch.Generator().manual_seed(seed))
            self.weight[:-1] = first.repeat(1, len(rates)).to(device)
        self.velocity = torch.zeros_like(self.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Logits `[B, R, C]` of features `[B, D]`."""
        rates, _, classes = self.shape
        return torch.addmm(self.weight[-1], features, self.weight[:-1]).unflatten(1, (rates, classes))

    def step(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One step of every classifier on the mean cross-entropy of a batch, at `factor` times its peak rate."""
        # d loss / d logits = (softmax - one-hot) / B
        gradient = self.logits(features).softmax(dim=2)
        gradient[torch.arange(len(labels), device=labels.device), :, labels] -= 1.0
        flat = gradient.flatten(1) / len(labels)
        self.velocity *= MOMENTUM
        self.velocity[:-1].addmm_(features.T, flat)
        self.velocity[-1] += flat.sum(dim=0)
        self.weight.addcmul_(self.velocity, self._rates.expand_as(self.velocity), value=-factor)

    def classify(self, features: Tensor) -> Tensor:
        """The most likely classes `[R, M, min(5, C)]` of features `[M, D]`, likeliest first, on the CPU."""
        best = [self.logits(part).topk(min(5, self.shape[2]), dim=2).indices.cpu() for part in features.split(BLOCK)]
        return torch.cat(best).transpose(0, 1)

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and velocities as `[R, D + 1, C]`."""
        rates, rows, classes = self.shape
        named = {"weight": self.weight, "velocity": self.velocity}
        return {name: value.view(rows, rates, classes).transpose(0, 1).contiguous() for name, value in named.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        for name, value in (("weight", self.weight), ("velocity", self.velocity)):
            value.copy_(tensors[name].transpose(0, 1).flatten(1))


class Source(Protocol):
    """Batches of features of the same images by one or more networks, the same on all ranks."""

    steps: int

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, a function of its number."""
        ...


class Standardised:
    """Features with mean 0 and deviation 1 over the training set, in every dimension: one rate then suits them all."""

    def __init__(self, features: CachedFeatures) -> None:
        self._features = features
        total = torch.zeros(features.width, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for _, block in features.blocks(0, features.size, BLOCK):
            total += block.double().sum(dim=0)
        mean = total / features.size
        for _, block in features.blocks(0, features.size, BLOCK):
            squares += (block.double() - mean).square().sum(dim=0)
        deviation = (squares / features.size).sqrt()
        # a dimension that is constant, as dead units are, stays at zero
        self.scale = torch.where(deviation > 1e-6, 1.0 / deviation.clamp(min=1e-6), 0.0).float()
        self.mean = mean.float()

    def take(self, rows: Int64Array) -> Tensor:
        """Some rows of the training set, standardised."""
        return self(self._features.take(rows))

    def __call__(self, block: Tensor) -> Tensor:
        """The block `[B, D]`, standardised."""
        return (block - self.mean) * self.scale


class FeatureSource:
    """Batches of features that are known: `epoch_order` of the images, the last incomplete batch left out."""

    def __init__(
        self, features: Sequence[Standardised], labels: Tensor, batch: int, seed: int, device: torch.device
    ) -> None:
        self._features, self._labels = features, labels
        self._batch, self._seed, self._device = min(batch, len(labels)), seed, device
        self.steps = len(labels) // self._batch

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        order = epoch_order(self._seed, epoch, len(self._labels))
        for rows in np.split(order[: self.steps * self._batch], self.steps):
            parts = [known.take(rows).to(self._device) for known in self._features]
            yield parts, self._labels[rows].to(self._device)


def train_epoch(heads: Sequence[Heads], source: Source, epoch: int, epochs: int) -> None:
    """One epoch of every network's classifiers; rates follow a cosine to 0 over all `epochs`."""
    for step, (features, labels) in enumerate(source.epoch(epoch)):
        factor = cosine(epoch * source.steps + step, epochs * source.steps, 1.0, 0.0)
        for own, rows in zip(heads, features, strict=True):
            own.step(rows, labels, factor)
