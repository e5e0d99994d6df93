from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.sampling.order import BLOCK_SAMPLES, epoch_order, rank_batches, subset


@pytest.mark.parametrize("kind", ["permutation", "blocks"])
def test_every_sample_once_and_pure(kind):
    for size in (1, 7, 1000, 40_001):
        order = epoch_order(3, 5, size, kind)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(size))
        assert np.array_equal(order, epoch_order(3, 5, size, kind))
    assert not np.array_equal(epoch_order(3, 5, 1000, kind), epoch_order(3, 6, 1000, kind))
    assert not np.array_equal(epoch_order(3, 5, 1000, kind), epoch_order(4, 5, 1000, kind))


def test_permutation_is_uniform():
    # where sample 0 ends up over many epochs, and how far neighbours are apart
    places = np.array([np.flatnonzero(epoch_order(0, e, 100) == 0)[0] for e in range(2000)])
    counts = np.bincount(places // 10, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 30
    order = epoch_order(0, 0, 100_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01


def test_blocks_touch_few_blocks_at_a_time():
    order = epoch_order(0, 0, 200_000, "blocks")
    touched = [len(np.unique(chunk // BLOCK_SAMPLES)) for chunk in np.array_split(order, len(order) // 16384)]
    assert max(touched) < 600  # of 3,125 blocks; a permutation touches nearly all
    assert len(np.unique(order[:256] // BLOCK_SAMPLES)) > 100  # and yet a batch is mixed


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_out_the_same_global_batches(world_size):
    order = epoch_order(1, 2, 1003)
    parts = [rank_batches(order, 64, rank, world_size) for rank in range(world_size)]
    together = np.concatenate(parts, axis=1)
    assert np.array_equal(together.reshape(-1), order[: 1003 // 64 * 64])


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="dealt to 3 ranks"):
        rank_batches(np.arange(100), 64, 0, 3)
    with pytest.raises(UserError, match="larger than the data set of 100"):
        rank_batches(np.arange(100), 128, 0, 1)


def test_subset_is_fixed_and_spread():
    ids = subset(10_000, 500)
    assert np.array_equal(ids, subset(10_000, 500))
    assert len(np.unique(ids)) == 500
    assert np.bincount(ids // 1000, minlength=10).min() > 25
    assert np.array_equal(subset(10, None), subset(10, 20))
