"""The loaders behind one interface: choose the backend, check what only the machine can tell, build."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from data_pipeline.beton.samples import open_samples
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.core.errors import UserError
from data_pipeline.loaders.batch import MultiCropLoader
from data_pipeline.loaders.evaluation import EvalLoader, EvalPlan
from data_pipeline.sampling.order import Int64Array, RankSampler, contiguous_part, subset

Backend = Literal["ffcv", "torchvision"]


@cache
def usable_backend(backend: Backend) -> Backend:
    """`backend`, or torchvision with one warning where FFCV is not installed: the same views, drawn more slowly.

    An FFCV that is installed and does not work is an error when it is used, not a reason to be slow.
    """
    if backend == "ffcv" and find_spec("ffcv") is None:
        warnings.warn(
            "data.backend: FFCV is not installed, the torchvision loader takes over, which is several times slower; "
            "pip install 'mokd[ffcv]', or set data.backend=torchvision",
            stacklevel=2,
        )
        return "torchvision"
    return backend


def build_loader(
    data: DataConfig,
    views: ViewsConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ids: Int64Array | None = None,
) -> MultiCropLoader:
    """The training loader of one rank. `data.train` is a beton; for backend torchvision it may be an image folder.

    ids: the samples to use, instead of those that `data.limit` keeps.

    Raises UserError when the data cannot be read as asked.
    """
    assert data.channels == views.channels
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: ranks count from 0")
    backend = usable_backend(data.backend)
    check_path(data.train, backend)
    warn_workers(data.workers)
    samples = open_samples(data.train, data.channels)
    kept = subset(samples.size, data.limit) if ids is None else ids
    sampler = RankSampler(kept, seed, rank, world_size, global_batch, data.order)
    # the backends are imported here: the reference one works without FFCV and the native library
    if backend == "torchvision":
        from data_pipeline.loaders.torchvision import TorchvisionLoader as Loader
    else:
        from data_pipeline.loaders.ffcv import FfcvLoader as Loader  # type: ignore[assignment]
    return Loader(data, views, samples, sampler, torch.device(device), dtype)


def build_eval_loader(
    path: Path,
    *,
    backend: Backend = "ffcv",
    resize_px: int,
    crop_px: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 8,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    ids: Int64Array | None = None,
) -> EvalLoader:
    """Labelled images for evaluation: shorter side to `resize_px` (bicubic), central `crop_px`, normalised, in order.

    Each rank gets a contiguous part of the (limited) data set; together they see every sample once. ids: the samples to
    use, instead of those that `limit` keeps. Raises UserError.
    """
    if crop_px > resize_px:
        raise UserError(f"evaluation: a crop of {crop_px} pixels cannot be cut from images resized to {resize_px}")
    backend = usable_backend(backend)
    check_path(path, backend)
    warn_workers(workers)
    if backend == "torchvision":
        from data_pipeline.loaders.torchvision import torchvision_eval_batches as batches
    else:
        from data_pipeline.loaders.ffcv_evaluation import ffcv_eval_batches as batches
    samples = open_samples(path, len(mean))
    kept = subset(samples.size, limit) if ids is None else ids
    low, high = contiguous_part(len(kept), rank, world_size)
    plan = EvalPlan(samples, kept[low:high], batch_size, resize_px, crop_px, mean, std, workers, torch.device(device))
    return EvalLoader(plan, batches, dataset_size=len(kept))


def warn_workers(workers: int) -> None:
    """Warns when there are fewer cores than workers: they only get in each other's way."""
    cores = len(os.sched_getaffinity(0))
    if workers > cores:
        warnings.warn(f"data.workers: {workers} workers share {cores} cores of this process", stacklevel=3)


def check_path(path: Path, backend: Backend) -> None:
    """UserError when there is nothing at `path` that the backend could read."""
    if not path.exists():
        raise UserError(f"{path}: no such file; make a beton with: mokd convert IMAGE_FOLDER {path}")
    if path.is_dir() and usable_backend(backend) == "ffcv":
        hint = f"convert it first (mokd convert {path} OUT.beton), or use data.backend=torchvision"
        raise UserError(f"{path}: is a folder; {hint}")


def count_samples(path: Path, backend: Backend, channels: int = 3) -> int:
    """How many samples a beton or folder holds, after the checks of `build_loader`. Raises UserError."""
    check_path(path, backend)
    return open_samples(path, channels).size
