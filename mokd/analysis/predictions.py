"""What the networks say of the test images: where their k-NN predictions agree, and their nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mokd.analysis import figures
from mokd.analysis.agreement import agreement
from mokd.analysis.finding import Finding
from mokd.analysis.members import Gathering
from mokd.evaluation import knn

NEIGHBORS = 5
_BARS = {
    "both_right": ("both right", "#009e73"),
    "only_first": ("only the first right", "#0072b2"),
    "only_second": ("only the second right", "#e69f00"),
    "both_wrong": ("both wrong", "#bbbbbb"),
}


def find_agreement(gathering: Gathering) -> Iterator[Finding]:
    """A bar of shares for every pair of networks."""
    found = gathering.predictions
    numbers: list[dict[str, Any]] = []
    for a, b in gathering.pairs():
        shares = agreement(found[a.label], found[b.label], gathering.test.labels)
        numbers.append({"first": a.label, "second": b.label, **asdict(shares)})
    figure, (axes,) = figures.panels(1, 7.0, 1.5 + 0.6 * len(numbers))
    names = [f"1: {pair['first']}\n2: {pair['second']}" for pair in numbers]
    left = np.zeros(len(numbers))
    for key, (label, color) in _BARS.items():
        values = np.array([100 * pair[key] for pair in numbers])
        bars = axes.barh(names, values, left=left, color=color, label=label, height=0.6)
        words = [f"{value:.1f}" if value >= 4 else "" for value in values]
        axes.bar_label(bars, words, label_type="center", fontsize=8, color="black")
        left += values
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    agreed = ", ".join(f"{100 * pair['agree']:.1f}" for pair in numbers)
    axes.set_xlabel(f"test images (%); the two predict the same class for {agreed}", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    said = "; ".join(
        f"{p['first']} and {p['second']} predict the same class for {100 * p['agree']:.1f}%, both right "
        f"{100 * p['both_right']:.1f}%, only {p['first']} right {100 * p['only_first']:.1f}%, only {p['second']} right "
        f"{100 * p['only_second']:.1f}%, both wrong {100 * p['both_wrong']:.1f}%"
        for p in numbers
    )
    alt = f"k-NN predictions for {gathering.test.size} images: {said}."
    yield Finding("agreement", alt, {"images": gathering.test.size, "pairs": numbers}, figure)


def find_neighbors(gathering: Gathering) -> Iterator[Finding]:
    """For some test images the nearest training images by every network, right ones framed in green."""
    train, test = gathering.job.train, gathering.test
    known, asked = gathering.features(train), gathering.features(test)
    nearest = []
    for mine, queries in zip(known, asked, strict=True):
        blocks = ((row, F.normalize(part, dim=1)) for row, part in mine.blocks(0, train.size, knn.BLOCK))
        wanted = F.normalize(queries.take(gathering.shown), dim=1).to(gathering.device)
        nearest.append(tuple(part.cpu() for part in knn.nearest(blocks, wanted, min(NEIGHBORS, train.size))))
    pictures = gathering.drawable(gathering.pictures)
    rows, names, numbers = [], [], []
    right = 0
    for i, row in enumerate(gathering.shown.tolist()):
        label = int(test.labels[row])
        entry: dict[str, Any] = {"sample": int(test.ids[row]), "class": test.classes[label], "neighbors": {}}
        for member, (similarity, places) in zip(gathering.members, nearest, strict=True):
            tiles = [figures.Tile(pictures[i], words=test.classes[label])]
            for value, place in zip(similarity[i].tolist(), places[i].tolist(), strict=True):
                its = int(train.labels[place])
                right += its == label
                color = "#00703c" if its == label else "#b00020"
                tiles.append(figures.Tile(_picture(gathering, place), words=train.classes[its], words_color=color))
                near = {"sample": int(train.ids[place]), "class": train.classes[its], "cosine": value}
                entry["neighbors"].setdefault(member.label, []).append(near)
            rows.append(tiles)
            names.append(member.label)
        numbers.append(entry)
    total = sum(len(near) for entry in numbers for near in entry["neighbors"].values())
    alt = (
        f"Nearest training images of {len(numbers)} test images by {', '.join(m.label for m in gathering.members)}; "
        f"{right} of {total} are of the image's class."
    )
    yield Finding("neighbors", alt, {"images": numbers}, figures.sheet(rows, names, tile=1.1))


def _picture(gathering: Gathering, row: int) -> torch.Tensor:
    """The center of a training image, `[S, S, 3]` in 0 to 1, as the test images are cut."""
    section, train = gathering.config.evaluation, gathering.job.train
    image = train.samples.image(int(train.ids[row]))
    side = min(image.size) * section.crop_px / section.resize_px
    left, top = (image.width - side) / 2, (image.height - side) / 2
    size = (section.crop_px, section.crop_px)
    cut = image.resize(size, box=(left, top, left + side, top + side), reducing_gap=None)
    return torch.from_numpy(np.asarray(cut, np.float32) / 255.0)
