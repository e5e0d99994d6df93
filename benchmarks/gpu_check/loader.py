"""The loader feeding the device: alone, and with the step of training behind it. Images are made on the spot."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_check.setting import Setting
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise
from data_pipeline.beton.convert import convert
from data_pipeline.beton.synthetic import generate
from data_pipeline.loaders.batch import MultiCropLoader, ViewBatch
from data_pipeline.loaders.build import build_loader
from mokd.optim.precision import view_dtype

CLASSES = 4


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """By backend: images per second of the loader alone, with the step behind it, and the part spent waiting for it."""
    with tempfile.TemporaryDirectory(prefix="mokd-gpu-check-") as folder:
        images = Path(folder) / "images"
        _make_images(images, setting)
        yield "images", {"count": setting.loader_images, "px": setting.loader_image_px}
        yield "torchvision", _fed(setting, "torchvision", images / "train")
        if importlib.util.find_spec("ffcv") is None:
            yield "ffcv", "not installed"
            return
        convert([images / "train"], Path(folder) / "train.beton")
        yield "ffcv", _fed(setting, "ffcv", Path(folder) / "train.beton")


def _make_images(folder: Path, setting: Setting) -> None:
    """Few are drawn, which takes long, and copied: decoding does not notice."""
    drawn = min(8, setting.loader_images // CLASSES)
    generate(folder, classes=CLASSES, per_class_train=drawn, per_class_test=0, size_px=setting.loader_image_px)
    for path in list((folder / "train").rglob("*.jpg")):
        for copy in range(1, setting.loader_images // CLASSES // drawn):
            shutil.copyfile(path, path.with_name(f"{path.stem}-{copy}.jpg"))


def _fed(setting: Setting, backend: Literal["ffcv", "torchvision"], source: Path) -> dict[str, float]:
    """Figures of one backend."""
    images = min(setting.batches[-1], setting.loader_images // 2)
    config = setting.sized(images)
    workers = min(config.data.workers, len(os.sched_getaffinity(0)))
    data = config.data.model_copy(update={"train": source, "backend": backend, "workers": workers, "limit": None})
    loader = build_loader(
        data,
        config.views,
        seed=config.seed,
        rank=0,
        world_size=1,
        global_batch=images,
        device=setting.device,
        dtype=view_dtype(config.precision, setting.device),
    )
    pair = Pair(config, setting.device)
    step = OurStep(pair)
    with closing(loader):
        alone, _ = _consume(loader, setting, images, lambda batch, number: None)
        fed, waiting = _consume(loader, setting, images, lambda batch, number: step(batch.views, FIRST_STEP + number))
    return {
        "workers": workers,
        "images_per_step": images,
        "images_per_second_alone": alone,
        "images_per_second_with_step": fed,
        "wait_fraction": waiting,
    }


def _consume(
    loader: MultiCropLoader, setting: Setting, images: int, use: Callable[[ViewBatch, int], object]
) -> tuple[float, float]:
    """Images per second, and the part of the time in which the loop waited for a batch, as training counts it."""
    with closing(_batches(loader)) as batches:
        for number in range(2):  # the loader's threads start, and kernels are compiled
            use(next(batches), number)
        synchronise(setting.device)
        began, waited, count = time.perf_counter(), 0.0, 0
        while count < 2 or time.perf_counter() - began < setting.loader_seconds:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            use(batch, count)
            count += 1
        synchronise(setting.device)
        elapsed = time.perf_counter() - began
    return images * count / elapsed, waited / elapsed


def _batches(loader: MultiCropLoader) -> Any:
    """Epoch after epoch."""
    for epoch in itertools.count():
        with closing(loader.epoch(epoch)) as batches:
            yield from batches
