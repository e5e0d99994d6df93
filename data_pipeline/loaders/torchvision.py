"""The reference loader: Pillow and torchvision, one operation after the other, in worker processes.

Slow and plain on purpose: the fast loader is held equal to it, and it runs where FFCV cannot be installed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from data_pipeline.beton.samples import Samples
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.core.errors import DataError
from data_pipeline.loaders.batch import LabelledBatch, ViewBatch
from data_pipeline.loaders.evaluation import EvalPlan
from data_pipeline.sampling.draws import BRIGHTNESS, CONTRAST, SATURATION, ViewDraws, draw_views, view_sizes
from data_pipeline.sampling.order import RankSampler

_TIMEOUT_SECONDS = 120.0
_PREFIX = f"{DataError.__module__}.{DataError.__qualname__}: "


def cut_view(image: Image.Image, box: Sequence[int], size: int, flip: bool) -> Image.Image:
    """The box (x, y, width, height) of an image as a square of `size` pixels, bicubic."""
    x, y, width, height = box
    view = F.resized_crop(image, y, x, height, width, [size, size], F.InterpolationMode.BICUBIC)
    return F.hflip(view) if flip else view


def change_colours(view: Image.Image, draws: ViewDraws, i: int, v: int, threshold: int) -> Image.Image:
    """Jitter, grey, blur and solarisation of view v of sample i."""
    if draws.jitter[i, v]:
        for operation in draws.order[i, v]:
            factor = float(draws.factor[i, v, operation])
            if operation == BRIGHTNESS:
                view = F.adjust_brightness(view, factor)
            elif operation == CONTRAST:
                view = F.adjust_contrast(view, factor)
            elif operation == SATURATION:
                view = F.adjust_saturation(view, factor)
            else:
                view = F.adjust_hue(view, factor)
    if draws.grey[i, v]:
        view = F.to_grayscale(view, num_output_channels=3)
    if draws.blur[i, v] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(draws.blur[i, v])))
    return F.solarize(view, threshold) if draws.solarize[i, v] else view


def change_channels(
    view: tuple[Image.Image, ...], draws: ViewDraws, i: int, v: int, threshold: int
) -> tuple[Image.Image, ...]:
    """The same for a view of other than three channels, each an image: contrast works towards the mean of them all,
    what is of colours is left out.
    """
    if draws.jitter[i, v]:
        for operation in draws.order[i, v]:
            factor = float(draws.factor[i, v, operation])
            if operation == BRIGHTNESS:
                view = tuple(F.adjust_brightness(channel, factor) for channel in view)
            elif operation == CONTRAST:
                mean = Image.new("L", view[0].size, int(np.mean([np.asarray(channel) for channel in view]) + 0.5))
                view = tuple(Image.blend(mean, channel, factor) for channel in view)
    if draws.blur[i, v] > 0:
        blur = ImageFilter.GaussianBlur(float(draws.blur[i, v]))
        view = tuple(channel.filter(blur) for channel in view)
    return tuple(F.solarize(channel, threshold) for channel in view) if draws.solarize[i, v] else view


def _channels(pixels: NDArray[np.uint8]) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(pixels.shape[2]))


def _normalised(view: Image.Image | tuple[Image.Image, ...], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    channels = view if isinstance(view, tuple) else (view,)
    return F.normalize(torch.cat([F.to_tensor(channel) for channel in channels]), list(mean), list(std))


class _Views(Dataset[tuple[list[Tensor], int, int]]):
    """Sample id to its finished views, for one epoch."""

    def __init__(self, samples: Samples, views: ViewsConfig, seed: int, epoch: int) -> None:
        self._samples, self._views, self._seed, self._epoch = samples, views, seed, epoch
        self._sizes = view_sizes(views).tolist()

    def __getitem__(self, sample_id: int) -> tuple[list[Tensor], int, int]:
        pixels = self._samples.pixels(sample_id)
        height, width, count = pixels.shape
        draws = draw_views(self._views, self._seed, self._epoch, [sample_id], [width], [height])
        image = Image.fromarray(pixels) if count == 3 else None
        channels = _channels(pixels) if image is None else ()
        views = []
        for v, size in enumerate(self._sizes):
            box, flip, threshold = draws.box[0, v].tolist(), bool(draws.flip[0, v]), self._views.solarize_threshold
            view: Image.Image | tuple[Image.Image, ...]
            if image is not None:
                view = change_colours(cut_view(image, box, size, flip), draws, 0, v, threshold)
            else:
                cut = tuple(cut_view(channel, box, size, flip) for channel in channels)
                view = change_channels(cut, draws, 0, v, threshold)
            views.append(_normalised(view, self._views.mean, self._views.std))
        return views, sample_id, int(self._samples.labels[sample_id])


class _Centres(Dataset[tuple[Tensor, int, int]]):
    """Sample id to the centre of its image."""

    def __init__(self, plan: EvalPlan) -> None:
        self._plan = plan

    def __getitem__(self, sample_id: int) -> tuple[Tensor, int, int]:
        plan = self._plan
        pixels, size = plan.samples.pixels(sample_id), [plan.crop_px, plan.crop_px]
        images = (Image.fromarray(pixels),) if pixels.shape[2] == 3 else _channels(pixels)
        resized = (F.resize(image, [plan.resize_px], F.InterpolationMode.BICUBIC) for image in images)
        centre = tuple(F.center_crop(image, size) for image in resized)
        return _normalised(centre, plan.mean, plan.std), sample_id, int(plan.samples.labels[sample_id])


def _batches(
    dataset: Dataset[Any], batches: Sequence[list[int]], workers: int, ahead: int, timeout: float
) -> Iterator[Any]:
    """Collated batches by worker processes. A worker that dies, fails or hangs ends in a DataError."""
    _say_nothing_of_semaphores()
    # forked from a process that has no threads: a fork of this one can inherit a lock that nobody will ever open
    processes = get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=ahead,
        timeout=timeout,
        multiprocessing_context=processes,
        worker_init_fn=_end_with_owner,
    )
    try:
        yield from loader
        return
    except DataError as error:  # raised in a worker: torch has wrapped its traceback around it
        failure = DataError(str(error).strip().splitlines()[-1].removeprefix(_PREFIX))
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        failure = DataError(f"torchvision loader: {str(error).splitlines()[0]}")
    # raised here, where the traceback that holds on to the workers and their queues is gone: they end now
    raise failure


def _say_nothing_of_semaphores() -> None:
    """A rank that is killed leaves semaphores, which Python's resource tracker removes; its warning tells nobody what
    to do. The tracker, a process of its own, takes its filters from the environment when it starts.
    """
    quiet, given = "ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS", "")
    if quiet not in given:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [given, quiet]))


def _end_with_owner(worker: int) -> None:
    """Ends this worker once the process that reads its batches is gone, however it went.

    torch's own watch looks at the parent, which is the fork server here; and that lives as long as its workers do.
    """
    owner = parent_process()
    assert owner is not None

    def wait() -> None:
        connection.wait([owner.sentinel])
        os._exit(1)

    Thread(target=wait, name="owner watch", daemon=True).start()


class TorchvisionLoader:
    """`data_pipeline.loaders.batch.MultiCropLoader` over a beton or an image folder, by Pillow and torchvision."""

    def __init__(
        self,
        data: DataConfig,
        views: ViewsConfig,
        samples: Samples,
        sampler: RankSampler,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._data, self._views, self._device, self._dtype = data, views, device, dtype
        self._samples, self._sampler = samples, sampler
        self.dataset_size, self.steps_per_epoch = len(sampler.ids), sampler.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch]:
        """The batches `start_step .. steps_per_epoch - 1` of an epoch, the same however it is entered."""
        data = self._data
        batches = self._sampler.epoch(epoch, start_step).tolist()
        dataset = _Views(self._samples, self._views, self._sampler.seed, epoch)
        loader = _batches(dataset, batches, data.workers, data.batches_ahead, data.batch_timeout_seconds)
        for views, ids, labels in loader:
            groups: list[Tensor] = []
            first = 0
            for group in self._views.groups:
                stacked = torch.stack(views[first : first + group.count])
                groups.append(stacked.to(self._device, self._dtype))
                first += group.count
            yield ViewBatch(tuple(groups), ids, labels)

    def close(self) -> None:
        """Nothing outlives an epoch."""


def torchvision_eval_batches(plan: EvalPlan) -> Iterator[LabelledBatch]:
    """The batches of a plan, by worker processes."""
    steps = range(0, len(plan.ids), plan.batch_size)
    batches = [plan.ids[i : i + plan.batch_size].tolist() for i in steps]
    for images, ids, labels in _batches(_Centres(plan), batches, plan.workers, 2, _TIMEOUT_SECONDS):
        yield LabelledBatch(images, ids, labels)
