"""t-SNE of every network's features, side by side in the same colors (van der Maaten and Hinton, 2008)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.sampling.order import Int64Array
from mokd.analysis import figures
from mokd.analysis.finding import Finding
from mokd.analysis.members import Gathering

CLASSES = 10  # more colors could not be told apart
PERPLEXITY = 30.0
SMALLEST = 5


def lacking(gathering: Gathering) -> str | None:
    """What is lacking: scikit-learn, or images."""
    if gathering.test.size < SMALLEST:
        return f"needs {SMALLEST} test images, and there are {gathering.test.size}"
    if importlib.util.find_spec("sklearn") is None:
        return "needs scikit-learn: pip install 'mokd[analyze]'"
    return None


def embed(features: Tensor, seed: int) -> NDArray[np.float32]:
    """Places `[N, 2]` of features `[N, D]`, L2-normalized first; from their first two principal components on."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    rows = F.normalize(features, dim=1).numpy()
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def rows_of_classes(labels: Int64Array, samples: int) -> tuple[Int64Array, list[int]]:
    """At most `samples` rows, in order, of at most ten classes (evenly spread over all), and these classes."""
    there = np.unique(labels)
    chosen = there[np.linspace(0, len(there) - 1, min(CLASSES, len(there))).astype(np.int64)]
    rows = np.flatnonzero(np.isin(labels, chosen))
    return rows[np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(np.int64)], chosen.tolist()


def find(gathering: Gathering) -> Iterator[Finding]:
    """A panel for every network."""
    test = gathering.test
    rows, classes = rows_of_classes(test.labels, len(gathering.sampled))
    labels = test.labels[rows]
    figure, axes = figures.panels(len(gathering.members), 3.8, 4.3)
    numbers: dict[str, Any] = {}
    handles: dict[str, Any] = {}
    for one, member, known in zip(axes, gathering.members, gathering.features(test), strict=True):
        places = embed(known.take(rows), gathering.config.seed)
        numbers[member.label] = [[round(float(x), 3) for x in place] for place in places]
        for color, label in zip(figures.COLORS, classes, strict=False):
            mine, name = places[labels == label].T, test.classes[label]
            handles[name] = one.scatter(*mine, s=10, color=color, edgecolors="white", linewidths=0.2, label=name)
        one.set(xticks=[], yticks=[])
        one.spines[:].set_visible(False)
        one.set_title(member.label, fontsize=10, loc="left")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    alt = (
        f"t-SNE of the features of {len(rows)} test images of {len(classes)} classes, one panel each for "
        f"{', '.join(numbers)}, the same color for a class in all."
    )
    about = {"samples": test.ids[rows].tolist(), "labels": labels.tolist()}
    yield Finding("tsne", alt, {"classes": [test.classes[c] for c in classes], **about, "places": numbers}, figure)
