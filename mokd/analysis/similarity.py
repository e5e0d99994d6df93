"""How alike and how rich the networks' features are: CKA layer by layer, RankMe of the last features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mokd.analysis import figures
from mokd.analysis.finding import Finding
from mokd.analysis.layers import captured_maps
from mokd.analysis.members import Gathering, Member
from mokd.monitoring.statistics import effective_rank, linear_cka

FEATURE = "pooled feature"

Gram = NDArray[np.float64]


def gram(features: Tensor) -> Gram:
    """Products `[N, N]` of features `[N, D]`, in double precision."""
    features = features.double()
    return (features @ features.T).cpu().numpy()


@torch.no_grad()
def layer_features(member: Member, gathering: Gathering) -> dict[str, Tensor]:
    """Of every block the mean of its map over positions `[N, C]`, and the pooled feature, for the sampled images."""
    parts: dict[str, list[Tensor]] = {}
    for images in gathering.batches(gathering.sampled):
        with captured_maps(member.backbone) as maps:
            found = member.backbone(images).pooled
            for name, output in maps.items():
                parts.setdefault(name, []).append(output.mean(dim=(1, 2)).float())
        parts.setdefault(FEATURE, []).append(found.float())
    return {name: torch.cat(rows) for name, rows in parts.items()}


def cka_matrix(first: dict[str, Gram], second: dict[str, Gram]) -> Gram:
    """Linear CKA of every layer of one network (rows) with every layer of another (columns)."""
    return np.array([[linear_cka(a, b) for b in second.values()] for a in first.values()])


def find_cka(gathering: Gathering) -> Iterator[Finding]:
    """A matrix for every pair of networks."""
    pairs = gathering.pairs()
    wanted = {member.label: member for pair in pairs for member in pair}
    grams = {
        label: {name: gram(rows) for name, rows in layer_features(member, gathering).items()}
        for label, member in wanted.items()
    }
    figure, axes = figures.panels(len(pairs), 4.2, 3.6)
    numbers: list[dict[str, Any]] = []
    said = []
    for one, (a, b) in zip(axes, pairs, strict=True):
        values = cka_matrix(grams[a.label], grams[b.label])
        picture = figures.matrix(one, values, f"CKA of {a.label} and {b.label}", f"block of {b.label}", a.label)
        one.set_ylabel(f"block of {a.label}")
        figure.colorbar(picture, ax=one, shrink=0.9)
        layers = {"first_layers": list(grams[a.label]), "second_layers": list(grams[b.label])}
        numbers.append({"first": a.label, "second": b.label, **layers, "cka": _plain(values)})
        most, last = float(np.nanmax(values)) if np.isfinite(values).any() else float("nan"), values[-1, -1]
        said.append(f"{a.label} and {b.label} at most {most:.2f}, of their pooled features {last:.2f}")
    alt = f"Linear CKA between the blocks of two networks, pooled features last: {'; '.join(said)}."
    yield Finding("cka", alt, {"images": len(gathering.sampled), "pairs": numbers}, figure)


def _plain(values: Gram) -> list[list[float | None]]:
    """With None in place of NaN, which JSON does not know."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def rank_me(features: Tensor) -> float:
    """RankMe of features `[N, D]` as they are, by the smaller of their two products."""
    return effective_rank(gram(features.T if features.shape[1] < features.shape[0] else features))


def find_rank(gathering: Gathering) -> Iterator[Finding]:
    """A bar for every network, of the rank over the largest that there could be."""
    sets = gathering.features(gathering.test)
    numbers = {}
    for member, known in zip(gathering.members, sets, strict=True):
        rank, largest = rank_me(known.take(gathering.sampled)), min(known.width, len(gathering.sampled))
        numbers[member.label] = {"rank_me": rank, "width": known.width, "largest": largest}
    figure, (axes,) = figures.panels(1, 4.6, 0.9 + 0.5 * len(numbers))
    labels = list(numbers)[::-1]
    colors = [figures.ALONE if m.alone else figures.COLORS[i % 10] for i, m in enumerate(gathering.members)][::-1]
    bars = axes.barh(labels, [numbers[label]["rank_me"] for label in labels], color=colors)
    words = [f"{numbers[label]['rank_me']:.1f} of {numbers[label]['largest']}" for label in labels]
    axes.bar_label(bars, words, padding=3)
    axes.set_xlabel("RankMe of the pooled features")
    axes.margins(x=0.25)
    said = "; ".join(f"{label} {found['rank_me']:.1f} of {found['largest']}" for label, found in numbers.items())
    alt = f"Effective rank (RankMe) of the pooled features of {len(gathering.sampled)} images: {said}."
    yield Finding("rank", alt, {"images": len(gathering.sampled), "effective_rank": numbers}, figure)
