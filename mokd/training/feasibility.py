"""What can be known to fail before anything starts."""

from __future__ import annotations

import sys
from typing import Any

from data_pipeline.beton.samples import open_samples
from data_pipeline.core.errors import UserError
from data_pipeline.loaders.build import count_samples
from mokd.config import RunConfig
from mokd.evaluation.data import check_neighbours, open_pair, warn_same
from mokd.loggers import base as loggers
from mokd.runs.run_directory import RunDirectory


def images_per_rank(config: RunConfig, world_size: int) -> int:
    """Images per rank and step; UserError when the global batch cannot be dealt out evenly."""
    batch = config.optim.global_batch
    if batch % world_size:
        near = [n for n in range(batch, 0, -1) if batch % n == 0 and n < world_size][:1]
        raise UserError(
            f"optim.global_batch: {batch} images cannot be dealt to {world_size} ranks evenly; "
            f"use a multiple of {world_size}, or {near[0] if near else 1} ranks"
        )
    own, parts = batch // world_size, config.optim.accumulate
    if own % parts:
        raise UserError(f"optim.accumulate: {own} images per rank cannot be dealt into {parts} equal micro-batches")
    return own


def data_identity(config: RunConfig) -> dict[str, Any]:
    """What a resumed run's training images must have in common with the checkpoint's: size, and a beton's content."""
    samples = open_samples(config.data.train, config.data.channels)
    facts: dict[str, Any] = {"dataset_size": min(samples.size, config.data.limit or sys.maxsize)}
    if not config.data.train.is_dir():  # a folder is known by paths and times, which a copy changes
        facts["data.fingerprint"] = samples.fingerprint()
    return facts


def check_shard_groups(config: RunConfig, world_size: int) -> None:
    """UserError when the ranks cannot be dealt into groups that share one copy of the state."""
    size = config.parallel.shard_group_size
    if size is not None and world_size % size:
        raise UserError(f"parallel.shard_group_size: {world_size} ranks cannot be dealt into groups of {size}")


def check(config: RunConfig, world_size: int, run: RunDirectory | None = None) -> None:
    """UserError, in one line, for a run that cannot work: batch, data, networks, crop sizes, weights to start from.

    run: the directory, where there is one already.
    """
    check_shard_groups(config, world_size)
    loggers.check(config.logging)
    per_rank = images_per_rank(config, world_size)
    data = config.data
    size = min(count_samples(data.train, data.backend, data.channels), data.limit or sys.maxsize)
    if size < config.optim.global_batch:
        raise UserError(
            f"optim.global_batch: {config.optim.global_batch} images per step, but {config.data.train} holds {size}"
        )
    config.objective.check_samples(size)
    if per_rank // config.optim.accumulate < 2 and world_size == 1:
        raise UserError("optim.global_batch: at least 2 images at a time, BatchNorm has no variance over one")
    if config.evaluation.every_epochs:
        train, test = open_pair(config.evaluation, config.data, for_monitor=True)
        warn_same(train, test)
        check_neighbours(config.evaluation.knn.k, train)
    _check_networks(config, run)


def _check_networks(config: RunConfig, run: RunDirectory | None) -> None:
    from mokd.models.backbones import measure_shapes  # torch and timm are imported only after the cheap checks
    from mokd.weights import initial

    sizes = [group.size_px for group in config.views.groups]
    if config.evaluation.every_epochs:
        sizes.append(config.evaluation.crop_px)
    for branch in config.branches:
        measure_shapes(branch, config.views.global_crops.size_px, sizes, config.data.channels)
    initial.check(config, run)
