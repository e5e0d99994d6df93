"""Which sample comes when: a pure function of (seed, epoch, data-set size), whatever the ranks and workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.core.errors import UserError
from data_pipeline.sampling.counter_rng import integers, key

Int64Array = NDArray[np.int64]
OrderKind = Literal["permutation", "blocks"]

BLOCK_SAMPLES = 64
WINDOW_BLOCKS = 256
_ORDER, _BLOCK, _SUBSET = 1, 2, 3
_CLASS_SUBSET = 5


def epoch_order(seed: int, epoch: int, size: int, kind: OrderKind = "permutation") -> Int64Array:
    """The positions 0 .. size-1 in the order in which an epoch visits them: int64 `[size]`.

    `permutation` is uniform. `blocks` is for data sets larger than memory: runs of `BLOCK_SAMPLES` neighbours are
    shuffled, and samples mix within windows of `WINDOW_BLOCKS` such runs, so that only a window has to be in the page
    cache at a time and disks read runs. Every rank computes the same order, so it works at any world size.
    """
    positions = np.arange(size, dtype=np.uint64)
    scatter = integers(key(seed, epoch, _ORDER), positions)
    if kind == "permutation":
        return np.argsort(scatter, kind="stable").astype(np.int64)
    blocks = -(-size // BLOCK_SAMPLES)
    block_keys = integers(key(seed, epoch, _BLOCK), np.arange(blocks, dtype=np.uint64))
    place = np.empty(blocks, np.int64)
    place[np.argsort(block_keys, kind="stable")] = np.arange(blocks)
    window = place[positions.astype(np.int64) // BLOCK_SAMPLES] // WINDOW_BLOCKS
    return np.lexsort((scatter, window)).astype(np.int64)


def subset(size: int, limit: int | None) -> Int64Array:
    """The sample ids that `data.limit` keeps: a random subset, always the same one, in data-set order.

    Not the first ones: those of a folder data set all belong to the first classes.
    """
    if limit is None or limit >= size:
        return np.arange(size, dtype=np.int64)
    scatter = integers(key(0, 0, _SUBSET), np.arange(size, dtype=np.uint64))
    return np.sort(np.argsort(scatter, kind="stable")[:limit]).astype(np.int64)


def class_subset(labels: Int64Array, fraction: float, seed: int) -> Int64Array:
    """The ids of `fraction` of each class, at least one image of it, in data-set order: a function of its arguments.

    labels: of all samples; -1 (none) counts as a class.
    """
    kept = []
    for number, label in enumerate(np.unique(labels)):
        members = np.flatnonzero(labels == label)
        scatter = integers(key(seed, number, _CLASS_SUBSET), np.arange(len(members)))
        kept.append(members[np.argsort(scatter, kind="stable")[: max(1, round(fraction * len(members)))]])
    return np.sort(np.concatenate(kept)).astype(np.int64)


def rank_batches(order: Int64Array, global_batch: int, rank: int, world_size: int) -> Int64Array:
    """What one rank sees: int64 `[steps, global_batch / world_size]`.

    Global batch t is `order[t * G : (t + 1) * G]`, whatever the world size; a rank takes its contiguous part of each.
    The last incomplete global batch is left out. UserError when the batch cannot be dealt out.
    """
    if global_batch % world_size:
        raise UserError(f"a global batch of {global_batch} cannot be dealt to {world_size} ranks: use a multiple of it")
    steps = len(order) // global_batch
    if steps == 0:
        raise UserError(f"a global batch of {global_batch} is larger than the data set of {len(order)} samples")
    batches = order[: steps * global_batch].reshape(steps, world_size, global_batch // world_size)
    return np.ascontiguousarray(batches[:, rank])


def contiguous_part(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last (exclusive) of `size` things that a rank gets where order is kept; parts differ by one at most."""
    return size * rank // world_size, size * (rank + 1) // world_size


@dataclass(frozen=True)
class RankSampler:
    """The samples that one rank sees, epoch by epoch. ids: those of the data set, int64; kind: see `epoch_order`."""

    ids: Int64Array
    seed: int
    rank: int
    world_size: int
    global_batch: int
    kind: OrderKind = "permutation"

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch. UserError as `rank_batches`."""
        return len(rank_batches(self.ids, self.global_batch, self.rank, self.world_size))

    def epoch(self, epoch: int, start_step: int = 0) -> Int64Array:
        """Sample ids of the batches from `start_step` on: int64 `[steps, global_batch / world_size]`."""
        order = epoch_order(self.seed, epoch, len(self.ids), self.kind)
        return self.ids[rank_batches(order, self.global_batch, self.rank, self.world_size)][start_step:]
