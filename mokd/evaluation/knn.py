"""Weighted k-nearest-neighbour classification, exact, in blocks, over training features sharded by rank.

Shape letters: N training images of this rank, M test images, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from mokd.evaluation.features import gather_rows

BLOCK = 1024


@dataclass(frozen=True)
class KnnAccuracy:
    """Accuracy in percent with k neighbours."""

    k: int
    top1: float
    top5: float


def check_labelled(features: Tensor, labels: Tensor, what: str) -> None:
    """UserError when there is nothing to compare, a label is missing, or a feature is not finite."""
    if labels.numel() == 0:
        raise UserError(f"{what}: holds no images")
    if int(labels.min()) < 0:
        raise UserError(f"{what}: holds images without label; evaluation needs a labelled data set")
    bad = (~torch.isfinite(features).all(dim=1)).nonzero()
    if bad.numel():
        raise UserError(f"{what}: the features of image {int(bad[0])} are not finite; the network has diverged")


def nearest(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products `[M, k]`, in descending order, and their rows in `train`; blockwise."""
    sims, rows = [], []
    for block in test.split(BLOCK):
        best = torch.zeros(block.shape[0], 0)
        index = torch.zeros(block.shape[0], 0, dtype=torch.int64)
        for start in range(0, train.shape[0], 16 * BLOCK):
            part = block @ train[start : start + 16 * BLOCK].T
            best = torch.cat([best, part], dim=1)
            here = torch.arange(start, start + part.shape[1]).expand_as(part)
            index = torch.cat([index, here], dim=1)
            best, chosen = best.topk(min(k, best.shape[1]), dim=1)
            index = index.gather(1, chosen)
        sims.append(best)
        rows.append(index)
    return torch.cat(sims), torch.cat(rows)


def vote(sims: Tensor, labels: Tensor, k: int, classes: int, temperature: float) -> Tensor:
    """Scores `[M, classes]`: the first k neighbours vote for their label with weight `exp(sim / temperature)`."""
    # relative to the nearest: the same ranking, and no overflow at low temperatures
    weights = ((sims[:, :k] - sims[:, :1]) / temperature).double().exp()
    scores = torch.zeros(sims.shape[0], classes, dtype=torch.float64)
    return scores.scatter_add_(1, labels[:, :k], weights)


def evaluate(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
) -> list[KnnAccuracy]:
    """Accuracies for every k in `ks`, from (features, labels) of this rank; the same result on every rank."""
    test_features, test_labels = gather_rows(test[0], device), gather_rows(test[1], device)
    check_labelled(test_features, test_labels, "evaluation.test")
    k = max(ks)
    if train[1].numel():
        sims, rows = nearest(train[0], test_features, k)
        neighbours = train[1][rows]
    else:
        sims, neighbours = torch.zeros(len(test_labels), 0), torch.zeros(len(test_labels), 0, dtype=torch.int64)
    # every rank's k best, merged: exact, and the training features stay where they are
    sims, neighbours = gather_rows(_padded(sims, k), device), gather_rows(_padded_labels(neighbours, k), device)
    tests = len(test_labels)
    sims = sims.unflatten(0, (-1, tests)).transpose(0, 1).flatten(1)
    neighbours = neighbours.unflatten(0, (-1, tests)).transpose(0, 1).flatten(1)
    sims, chosen = sims.topk(k, dim=1)
    neighbours = neighbours.gather(1, chosen)
    found = int((neighbours[0] >= 0).sum()) if tests else 0
    if found == 0:
        raise UserError("evaluation.train: holds no labelled images")
    neighbours, sims = neighbours[:, :found], sims[:, :found]
    classes = int(max(neighbours.max(), test_labels.max())) + 1
    results = []
    for count in ks:
        scores = vote(sims, neighbours, min(count, found), classes, temperature)
        ranked = scores.topk(min(5, classes), dim=1).indices
        hits = ranked == test_labels[:, None]
        top1, top5 = hits[:, 0].double().mean(), hits.any(dim=1).double().mean()
        results.append(KnnAccuracy(count, 100.0 * float(top1), 100.0 * float(top5)))
    return results


def _padded(sims: Tensor, k: int) -> Tensor:
    return torch.nn.functional.pad(sims, (0, k - sims.shape[1]), value=-torch.inf)


def _padded_labels(labels: Tensor, k: int) -> Tensor:
    return torch.nn.functional.pad(labels, (0, k - labels.shape[1]), value=-1)
