"""How much a target from another branch is to be relied on: image by image, and branch by branch.

Shape letters: N branches, Q teacher views, B images per rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from mokd.config import CrossGateConfig
from mokd.distributed.process_group import all_reduce_sum, world_size

# of the mean agreement of a branch: some hundred steps, so that a branch is not paused for a batch; it begins at 0, as
# no gap is believed before
MOMENTUM = 0.99


class CrossGate:
    """Weights from 0 to 1 of cross targets. reliability `[N]`: a running mean of every branch's `view_agreement`."""

    def __init__(self, config: CrossGateConfig, names: Sequence[str], device: torch.device) -> None:
        self.config, self.names = config, list(names)
        self.reliability = torch.zeros(len(names), device=device)
        self._seen: list[Tensor] = []  # of the micro-batches of this step

    def weights(self, giver: int, taker: int, agreement: Tensor) -> Tensor:
        """Of a branch's targets for another, `[B]`, for the agreement `[N, B]` of all; the host reads nothing."""
        weights = agreement[giver] if self.config.agreement else torch.ones_like(agreement[giver])
        if self.config.gap is None:
            return weights
        ahead = self.reliability[taker] - self.reliability[giver]
        return weights * (ahead <= self.config.gap)

    def remember(self, agreement: Tensor) -> None:
        """Takes notice of the agreement `[N, B]` in a micro-batch."""
        self._seen.append(agreement.mean(dim=1))

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the running means by what all ranks have seen in the step."""
        if self._seen:
            mean = all_reduce_sum(torch.stack(self._seen).mean(dim=0)) / world_size()
            self.reliability.lerp_(mean.to(self.reliability.dtype), 1.0 - MOMENTUM)
            self._seen.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """The running means, `reliability/<branch>`."""
        return {f"reliability/{name}": self.reliability[n] for n, name in enumerate(self.names)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        for key, value in self.state_tensors().items():
            value.copy_(tensors[key])


def view_agreement(probabilities: Tensor) -> Tensor:
    """How alike the targets `[Q, B, K]` of an image's views are, `[B]`, from 0 to 1; see the reference."""
    pairs = list(combinations(probabilities, 2))
    return torch.stack([(p * q).sqrt_().sum(dim=-1) for p, q in pairs]).mean(dim=0).clamp(max=1.0)


def mean_target(given: Sequence[Tensor], weights: Sequence[Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """The target `[..., B, K]` that several givers' targets have together, and what it weighs, `[B]`.

    Cross-entropy is linear in its target: the loss is the mean of those against each. Every giver's target is
    multiplied by its weights.
    """
    if weights is None:
        return _mean(given), None
    return _mean([p * w.unsqueeze(-1) for p, w in zip(given, weights, strict=True)]), _mean(weights)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(dim=0)
