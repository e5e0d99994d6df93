"""Weighted k-nearest-neighbour classification, exact, block by block, over training features sharded by rank.

Ties have a rule, so that the answer does not depend on blocks or ranks: of two training images equally similar, the
one that comes first in its data set is nearer; of two classes with equal scores, the one with the smaller number wins.

Shape letters: N training images, M test images, D width, k neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mokd.evaluation.features import gather_rows

TEST_BLOCK = 1024
BLOCK = 8192

# rows of training features and where the first of them lies in the data set
Blocks = Iterable[tuple[int, Tensor]]


def blocks_of(features: Tensor, first_row: int = 0) -> Blocks:
    """Features in memory, block by block."""
    return ((first_row + start, features[start : start + BLOCK]) for start in range(0, len(features), BLOCK))


def nearest(train: Blocks, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products `[M, k]`, in descending order, and their rows in the data set.

    On the device of `test`. With fewer than k training images the rest is -inf, in row -1. Beside the result only one
    product of a block of test and a block of training features is in memory.
    """
    sims = torch.full((len(test), k), -torch.inf, device=test.device)
    rows = torch.full((len(test), k), -1, device=test.device)
    for first_row, block in train:
        block = block.to(test.device)
        here = torch.arange(first_row, first_row + len(block), device=test.device)
        for part in range(0, len(test), TEST_BLOCK):
            at = slice(part, part + TEST_BLOCK)
            products = test[at] @ block.T
            all_sims = torch.cat([sims[at], products], dim=1)
            all_rows = torch.cat([rows[at], here.expand_as(products)], dim=1)
            sims[at], rows[at] = best(all_sims, all_rows, k)
    return sims, rows


def best(sims: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each line of `sims` `[M, n]`, descending, equal ones by ascending `rows` `[M, n]`."""
    k = min(k, sims.shape[1])
    values, chosen = sims.topk(k, dim=1)
    # topk takes any of those that equal its last value: where there are more of them, an exact sort decides
    crowded = (sims >= values[:, -1:]).sum(dim=1) > k
    if crowded.any():
        chosen[crowded] = _order(sims[crowded], rows[crowded])[:, :k]
    sims, rows = sims.gather(1, chosen), rows.gather(1, chosen)
    order = _order(sims, rows)
    return sims.gather(1, order), rows.gather(1, order)


def _order(sims: Tensor, rows: Tensor) -> Tensor:
    by_row = rows.argsort(dim=1, stable=True)
    return by_row.gather(1, sims.gather(1, by_row).argsort(dim=1, descending=True, stable=True))


def vote(sims: Tensor, labels: Tensor, k: int, classes: int, temperature: float) -> Tensor:
    """Scores `[M, C]`: the first k neighbours vote for their label with weight `exp(sim / temperature)`."""
    # relative to the nearest: the same ranking, and no overflow at low temperatures
    weights = ((sims[:, :k] - sims[:, :1]) / temperature).double().exp()
    scores = torch.zeros(sims.shape[0], classes, dtype=torch.float64, device=sims.device)
    return scores.scatter_add_(1, labels[:, :k], weights)


def classify(
    train: Blocks, labels: Tensor, test: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> list[Tensor]:
    """For every k the most likely classes `[M, min(5, C)]` of L2-normalised test features, on the CPU.

    train: this rank's L2-normalised features. labels `[N]`: of the whole training set. test: all of it, on the device
    to be used. k is at most N. The same on every rank.
    """
    k = max(ks)
    sims, rows = nearest(train, test, k)
    # every rank's k best, merged: exact, and the training features stay where they are
    device = test.device
    sims, rows = (_side_by_side(gather_rows(part, device), len(test)) for part in (sims, rows))
    # on the device of the test features: what a GPU sorts in milliseconds takes a CPU half a minute
    sims, rows = best(sims.to(device), rows.to(device), k)
    sims, neighbours = sims.cpu(), labels[rows.cpu()]  # votes add up in one order: on a GPU they would not
    answers = []
    for count in ks:
        scores = vote(sims, neighbours, count, classes, temperature)
        answers.append(most_voted(scores.to(device), min(5, classes)).cpu())
    return answers


def most_voted(scores: Tensor, count: int) -> Tensor:
    """The `count` classes `[M, count]` with the largest scores `[M, C]`, descending, equal ones by number.

    `scores` is overwritten. Few maxima are found sooner than a whole line is sorted.
    """
    found = []
    for _ in range(count):
        found.append(scores.argmax(dim=1, keepdim=True))  # the first of several
        scores.scatter_(1, found[-1], -torch.inf)
    return torch.cat(found, dim=1)


def _side_by_side(gathered: Tensor, tests: int) -> Tensor:
    """`[ranks * M, k]` to `[M, ranks * k]`."""
    return gathered.unflatten(0, (-1, tests)).transpose(0, 1).flatten(1)
