"""How far the networks see: attention distances and effective receptive fields, branches against their baselines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mokd.analysis import figures
from mokd.analysis.attention_distance import attention_distances
from mokd.analysis.finding import Finding
from mokd.analysis.members import Gathering, Member
from mokd.analysis.receptive_field import central_fields, field_distances, half_weight_radius

DRAWS, FIELD_IMAGES, FIELD_COLUMNS, BATCH = 4, 32, 5, 8


def find(gathering: Gathering) -> Iterator[Finding]:
    """The distances of every block as curves; then the fields of some blocks as pictures."""
    attention: dict[str, dict[str, list[float]]] = {}
    field: dict[str, dict[str, float]] = {}
    images = gathering.images(gathering.sampled[:FIELD_IMAGES])
    for member in gathering.members:
        heads = _over_batches(attention_distances(member.backbone, part) for part in images.split(BATCH))
        if heads:
            attention[member.label] = {name: values.mean(dim=0).tolist() for name, values in heads.items()}
        seed = gathering.config.seed
        places = _over_batches(
            {name: d.T for name, d in field_distances(member.backbone, part, DRAWS, seed + i).items()}
            for i, part in enumerate(images.split(BATCH))
        )
        field[member.label] = {name: float(values.nanmean()) for name, values in places.items()}
    yield Finding(
        "distance",
        _alt(attention, field),
        {"images": len(images), "attention_distance_px": attention, "field_distance_px": field},
        _curves(gathering, attention, field),
    )
    yield _fields(gathering, images, field)


def _over_batches(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, values in part.items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def _alt(attention: dict[str, dict[str, list[float]]], field: dict[str, dict[str, float]]) -> str:
    said = [
        f"mean attention distance of {label} from {_mean(layers, 0):.1f} pixels in the first block to "
        f"{_mean(layers, -1):.1f} in the last"
        for label, layers in attention.items()
    ]
    for label, layers in field.items():
        values = list(layers.values())
        said.append(f"mean distance in the receptive field of {label} from {values[0]:.1f} to {values[-1]:.1f} pixels")
    return "How far the networks see, block by block: " + "; ".join(said) + "."


def _mean(layers: dict[str, list[float]], at: int) -> float:
    heads = list(layers.values())[at]
    return sum(heads) / len(heads)


def _curves(gathering: Gathering, attention: dict[str, Any], field: dict[str, Any]) -> Any:
    seeing = [member for member in gathering.own if member.label in attention]
    figure, axes = figures.panels(len(seeing) + len(gathering.own), 4.0, 3.4)
    for one in axes:
        one.grid(axis="y", lw=0.4, alpha=0.5)
        one.set_xlabel("block")
        one.xaxis.get_major_locator().set_params(integer=True)
    for one, member in zip(axes, seeing, strict=False):
        for other in _with_baseline(gathering, member):
            color, style = _look(gathering, other)
            layers = list(attention[other.label].values())
            for block, heads in enumerate(layers, 1):
                one.plot([block] * len(heads), heads, ".", color=color, ms=4, alpha=0.6)
            blocks, means = range(1, len(layers) + 1), [sum(heads) / len(heads) for heads in layers]
            one.plot(blocks, means, style, color=color, lw=1.8, label=f"{other.label}: mean of heads")
        one.set_title(f"{member.branch}: attention distance", fontsize=10, loc="left")
        one.set_ylabel("mean distance (pixels); a dot per head", fontsize=9)
    for one, member in zip(axes[len(seeing) :], gathering.own, strict=True):
        for other in _with_baseline(gathering, member):
            color, style = _look(gathering, other)
            values = list(field[other.label].values())
            one.plot(range(1, len(values) + 1), values, style, marker="o", ms=3, color=color, lw=1.8, label=other.label)
        one.set_title(f"{member.branch}: receptive field", fontsize=10, loc="left")
        one.set_ylabel("mean distance (pixels)", fontsize=9)
    for one in axes:
        one.set_ylim(0.0, 1.08 * one.get_ylim()[1])
        one.legend(fontsize=8, frameon=False)
    return figure


def _with_baseline(gathering: Gathering, member: Member) -> list[Member]:
    return [other for other in gathering.members if other.branch == member.branch]


def _look(gathering: Gathering, member: Member) -> tuple[str, str]:
    """Color and line of a member."""
    if member.alone:
        return figures.ALONE, "--"
    return figures.COLORS[gathering.own.index(member) % len(figures.COLORS)], "-"


def _fields(gathering: Gathering, images: Tensor, field: dict[str, dict[str, float]]) -> Finding:
    """The mean field of the central cell, in some blocks of every network."""
    rows: list[list[figures.Tile]] = []
    numbers: dict[str, dict[str, float]] = {}
    for member in gathering.members:
        names = list(field[member.label])
        places = torch.linspace(0, len(names) - 1, min(FIELD_COLUMNS, len(names))).round().int().tolist()
        chosen = [names[i] for i in places]
        batches = images.split(BATCH)
        parts = [central_fields(member.backbone, part, chosen, gathering.config.seed) for part in batches]
        rows.append([])
        for name in chosen:
            fields = torch.stack([part[name][0].cpu() * len(batch) for part, batch in zip(parts, batches, strict=True)])
            mean = fields.sum(dim=0) / len(images)
            # a root, or nothing but the center could be seen; the numbers are those of the field itself
            shade = (mean / mean.max().clamp_min(1e-30)).sqrt()
            rows[-1].append(figures.Tile((1.0 - shade)[..., None].expand(-1, -1, 3), words=name))
            numbers.setdefault(member.label, {})[name] = half_weight_radius(mean, parts[0][name][1])
    said = "; ".join(f"{label} {list(widths.values())[-1]:.0f} pixels" for label, widths in numbers.items())
    alt = f"Effective receptive fields of the central cell; radius that holds half of the last block's weight: {said}."
    figure = figures.sheet(rows, [member.label for member in gathering.members])
    return Finding("receptive_fields", alt, {"images": len(images), "half_weight_radius_px": numbers}, figure)
