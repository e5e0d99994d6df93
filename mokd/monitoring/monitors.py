"""Monitors: what branches show of a step, over all ranks, on its way to the host without anybody waiting for it.

Shape letters: W ranks, B images per rank, N images looked at closely, D width, K prototypes, H heads of all branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mokd.config import RunConfig
from mokd.distributed.host_copy import HostCopy
from mokd.distributed.process_group import Ranks, all_gather, all_reduce_sum
from mokd.losses.kernels.targets import entropy
from mokd.monitoring.statistics import centered, divergence, effective_rank, linear_cka, relative_change
from mokd.objectives.branch import BranchLoss, Observation

# of all ranks together, whose features are compared: as many as singular values take a moment for
IMAGES = 256


class OfRank(NamedTuple):
    """Parts of the time since the step logged before: waiting for data, and all that needs no other rank."""

    data_wait: float
    own: float


class Measured(NamedTuple):
    """What a step has shown, by key of the metrics: numbers, and distributions."""

    values: dict[str, float]
    histograms: dict[str, NDArray[np.float64]]


class Pending:
    """Numbers on their way from the device: scalars by key, `OfRank` of all ranks `[W, 2]`, arrays by name."""

    def __init__(
        self,
        scalars: Mapping[str, Tensor],
        ranks: Tensor,
        arrays: Mapping[str, Tensor],
        weights: Mapping[str, Mapping[str, float]],
    ) -> None:
        self._keys, self._world, self._weights = list(scalars), ranks.shape[0], weights
        self._shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        parts = [torch.stack([value.double() for value in scalars.values()]), ranks, *arrays.values()]
        self._numbers = HostCopy(torch.cat([part.double().flatten() for part in parts]))

    def ready(self) -> bool:
        """Whether `measured` would answer at once."""
        return self._numbers.ready()

    def measured(self) -> Measured:
        """The numbers, and what the host makes of them."""
        sizes = [len(self._keys), 2 * self._world, *(int(np.prod(shape)) for shape in self._shapes.values())]
        scalars, ranks, *rest = np.split(self._numbers.values().numpy(), np.cumsum(sizes)[:-1])
        arrays = {name: a.reshape(shape) for (name, shape), a in zip(self._shapes.items(), rest, strict=True)}
        values = dict(zip(self._keys, scalars.tolist(), strict=True))
        values |= {**_of_ranks(ranks.reshape(-1, 2)), **_cross_to_self(values, self._weights)}
        grams = {name.removeprefix("gram/"): a for name, a in arrays.items() if name.startswith("gram/")}
        for branch, gram in grams.items():
            values[f"feature_rank/{branch}"] = effective_rank(gram)
            values[f"feature_rank_centered/{branch}"] = effective_rank(centered(gram))
        for a, b in combinations(grams, 2):
            if np.isfinite(similarity := linear_cka(grams[a], grams[b])):
                values[f"agreement/{a}-{b}"] = similarity
        return Measured(values, {name: a for name, a in arrays.items() if not name.startswith("gram/")})


def _of_ranks(ranks: NDArray[np.float64]) -> dict[str, float]:
    """Of the slowest rank, which all wait for: which it is, where there are several, and how far behind the others."""
    waits, own = ranks.T
    found: dict[str, float] = {"data_wait_fraction": float(waits.max())}
    if len(ranks) > 1:
        slowest = int(own.argmax())
        found |= {
            "data_wait_rank": int(waits.argmax()),
            "slow_rank": slowest,
            "slow_rank_excess": float(own[slowest] - np.delete(own, slowest).mean()),
        }
    return found


def _cross_to_self(values: Mapping[str, float], weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the cross terms of a branch weigh in its loss, over all else in it. weights: of every term, by branch."""
    found = {}
    for branch, by_term in weights.items():
        keys = {term: f"loss/{branch}/{term}" for term in by_term if term.startswith("cross")}
        terms = {term: values[key] for term, key in keys.items() if key in values}
        cross = sum(by_term[term] * value for term, value in terms.items())
        rest = values[f"loss/{branch}/total"] - cross
        if terms and rest > 0.0:
            found[f"cross_to_self/{branch}"] = cross / rest
    return found


class Monitors:
    """Collects what all ranks show; every rank calls `collect` at the same steps. Only reads."""

    def __init__(self, config: RunConfig, ranks: Ranks, device: torch.device) -> None:
        self._config, self._ranks, self._device = config, ranks, device
        self._targets: Tensor | None = None  # [H, K], of the logged step before
        self._centers: Tensor | None = None

    @torch.no_grad()
    def collect(
        self,
        names: Sequence[str],
        losses: Sequence[BranchLoss],
        updates: Mapping[str, Mapping[str, Tensor]],
        own: OfRank,
    ) -> Pending | None:
        """Begins to bring a step's numbers to the host of the first rank; None on all others.

        names: of the branches. updates: by branch, the same on every rank.
        """
        means = {
            f"loss/{name}/{term}": value
            for name, loss in zip(names, losses, strict=True)
            for term, value in [("total", loss.total.detach()), *loss.terms.items()]
        }
        wanted = self._config.logging.monitors
        observed = {name: loss.observe() for name, loss in zip(names, losses, strict=True)} if wanted else {}
        for branch, seen in observed.items():
            means |= {f"{name}/{branch}": value for name, value in seen.scalars.items()}
            means |= {_key("teacher_entropy", branch, head): e.mean() for head, e in seen.entropies.items()}
        reduced, ranks = self._over_ranks(means, own)
        heads = [(b, h) for b, seen in observed.items() for h in seen.mean_targets]
        targets = all_reduce_sum(torch.stack([observed[b].mean_targets[h] for b, h in heads])) if heads else None
        rows = self._rows(observed) if observed else {}
        if not self._ranks.is_main:
            return None
        scalars = {**reduced, **{_at(key, b): v for b, found in updates.items() for key, v in found.items()}}
        if targets is not None:
            scalars |= self._of_targets(heads, targets, torch.stack([observed[b].centers[h] for b, h in heads]))
        arrays: dict[str, Tensor] = {}
        for (name, branch), columns in rows.items():
            if name != "features":
                arrays[_key("teacher_entropy", branch, name)] = columns
            elif len(columns) > 1:
                spread = columns.std(dim=0)
                scalars[f"feature_std/{branch}"] = spread.mean()
                scalars[f"feature_spread/{branch}"] = spread.mean() * len(spread) ** 0.5
                arrays |= {f"gram/{branch}": columns @ columns.T, f"feature_std/{branch}": spread}
        weights = {name: loss.weights for name, loss in zip(names, losses, strict=True)}
        return Pending(scalars, ranks, arrays, weights)

    def _over_ranks(self, means: Mapping[str, Tensor], own: OfRank) -> tuple[dict[str, Tensor], Tensor]:
        """Means over ranks, and every rank's own numbers `[W, 2]`, in one collective."""
        world = self._ranks.world_size
        table = torch.zeros(world, 2, dtype=torch.float64)
        table[self._ranks.rank] = torch.tensor(own, dtype=torch.float64)
        local = torch.stack([value.double() for value in means.values()])
        sums = all_reduce_sum(torch.cat([local, table.flatten().to(local.device)]))
        reduced, by_rank = sums[: len(means)] / world, sums[len(means) :].view(world, 2)
        return dict(zip(means, reduced.unbind(), strict=True)), by_rank

    def _of_targets(self, heads: Sequence[tuple[str, str]], targets: Tensor, centers: Tensor) -> dict[str, Tensor]:
        """What the mean targets `[H, K]` and centers `[H, K]` say by themselves, and compared with those before."""
        targets = targets.double() / targets.double().sum(dim=-1, keepdim=True)
        found = {"prototypes_in_use": entropy(targets).exp(), "center_norm": centers.norm(dim=-1)}
        if self._targets is not None and self._centers is not None:
            found["target_kl"] = divergence(targets, self._targets)
            found["center_change"] = relative_change(centers, self._centers)
        self._targets, self._centers = targets, centers.clone()
        return {_key(name, b, h): values[i] for name, values in found.items() for i, (b, h) in enumerate(heads)}

    def _rows(self, observed: Mapping[str, Observation]) -> dict[tuple[str, str], Tensor]:
        """Features `[N, D]` of every branch and entropies `[N]` of its heads, of as many images of every rank."""
        columns: dict[tuple[str, str], Tensor] = {}
        for branch, seen in observed.items():
            columns["features", branch] = seen.features
            columns |= {(head, branch): values.unsqueeze(1) for head, values in seen.entropies.items()}
        own = min(-(-IMAGES // self._ranks.world_size), *(len(rows) for rows in columns.values()))
        wide = any(rows.dtype == torch.float64 for rows in columns.values())
        dtype = torch.float64 if wide else torch.float32
        together = torch.cat([rows[:own].to(dtype) for rows in columns.values()], dim=1)
        parts = all_gather(together).flatten(0, 1).double().split([rows.shape[1] for rows in columns.values()], dim=1)
        return {key: part if key[0] == "features" else part[:, 0] for key, part in zip(columns, parts, strict=True)}


def _key(name: str, branch: str, head: str) -> str:
    """`<name>/<branch>` for the first head of DINO, on the pooled feature; `<name>/<branch>/<head>` for others."""
    return f"{name}/{branch}" if head == "mlp" else f"{name}/{branch}/{head}"


def _at(key: str, branch: str) -> str:
    """`gradient_norm/backbone` of a branch is `gradient_norm/<branch>/backbone`."""
    name, _, part = key.partition("/")
    return f"{name}/{branch}/{part}" if part else f"{name}/{branch}"
