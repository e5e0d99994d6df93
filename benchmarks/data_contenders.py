"""What is compared: loaders that give the same views of the same images, as iterators over batches."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F

from data_pipeline.beton.format import BetonInfo, open_beton
from data_pipeline.beton.samples import BetonSamples
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.loaders.build import build_loader
from data_pipeline.loaders.ffcv import FfcvLoader
from data_pipeline.loaders.torchvision import cut_view
from data_pipeline.sampling.draws import draw_views, view_sizes
from data_pipeline.sampling.order import epoch_order

SEED, BATCH = 5, 32
VIEWS = ViewsConfig()
# neither scaled nor shifted, to compare and to count differences in grey levels
PLAIN = VIEWS.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})

# groups of views, each [V, B, 3, S, S]
Views = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """Batches of views, again and again; `groups` makes a batch what contenders are compared by."""

    batches: Callable[[], Iterator[object]]
    groups: Callable[[object], Views]


def ours_full(path: Path, workers: int, views: ViewsConfig = VIEWS) -> Contender:
    """The FFCV loader with all photometrics on the CPU."""
    return Contender(lambda: _epochs(path, "ffcv", workers, views), lambda batch: batch.views)  # type: ignore


def reference_full(path: Path, workers: int, views: ViewsConfig = VIEWS) -> Contender:
    """The torchvision and Pillow loader, everything in its worker processes."""
    return Contender(lambda: _epochs(path, "torchvision", workers, views), lambda batch: batch.views)  # type: ignore


def _epochs(path: Path, backend: str, workers: int, views: ViewsConfig) -> Iterator[object]:
    data = DataConfig(train=path, backend=backend, workers=workers, batches_ahead=3)  # type: ignore[arg-type]
    with closing(build_loader(data, views, seed=SEED, rank=0, world_size=1, global_batch=BATCH)) as loader:
        for epoch in range(1000):
            with closing(loader.epoch(epoch)) as batches:
                yield from batches


def ours_crops(path: Path, workers: int) -> Contender:
    """The FFCV loader up to where a GPU takes over: uint8 crops in one block of host memory."""

    def batches() -> Iterator[object]:
        data = DataConfig(train=path, workers=workers, batches_ahead=3)
        loader = build_loader(data, VIEWS, seed=SEED, rank=0, world_size=1, global_batch=BATCH)
        assert isinstance(loader, FfcvLoader)
        with closing(loader):
            for epoch in range(1000):
                with closing(loader.packed_epoch(epoch)) as packed:
                    yield from packed

    def groups(packed: object) -> Views:
        found, start = [], 0
        crops = torch.from_numpy(packed.crops)  # type: ignore[attr-defined]
        for group in VIEWS.groups:
            end = start + group.count * 3 * group.size_px**2
            found.append(crops[:, start:end].view(-1, group.count, 3, group.size_px, group.size_px).transpose(0, 1))
            start = end
        return tuple(group.float() / 255 for group in found)

    return Contender(batches, groups)


class _Crops(Dataset[list[Tensor]]):
    """The reference's crops alone, as uint8, one tensor per group of views: nothing more than ours make."""

    def __init__(self, beton: BetonInfo, epoch: int) -> None:
        self._samples, self._epoch, self._sizes = BetonSamples(beton), epoch, view_sizes(VIEWS).tolist()

    def __getitem__(self, sample_id: int) -> list[Tensor]:
        image = self._samples.image(sample_id)
        draws = draw_views(VIEWS, SEED, self._epoch, [sample_id], [image.width], [image.height])
        views = [
            F.pil_to_tensor(cut_view(image, draws.box[0, v].tolist(), size, bool(draws.flip[0, v])))
            for v, size in enumerate(self._sizes)
        ]
        globals_ = VIEWS.global_crops.count
        return [torch.stack(views[:globals_]), torch.stack(views[globals_:])]


def reference_crops(path: Path, workers: int) -> Contender:
    """torchvision and Pillow, crops only."""

    def batches() -> Iterator[object]:
        beton = open_beton(path)
        for epoch in range(1000):
            order = epoch_order(SEED, epoch, beton.size)
            steps = len(order) // BATCH
            sampler = order[: steps * BATCH].reshape(steps, BATCH).tolist()
            yield from DataLoader(_Crops(beton, epoch), batch_sampler=sampler, num_workers=workers, prefetch_factor=3)

    def groups(batch: object) -> Views:
        return tuple(group.transpose(0, 1).float() / 255 for group in batch)  # type: ignore[attr-defined]

    return Contender(batches, groups)


def first_batch(contender: Contender) -> Views:
    """The first batch, copied."""
    with closing(contender.batches()) as batches:  # type: ignore[type-var]
        return tuple(group.clone() for group in contender.groups(next(iter(batches))))


def images_per_second(contender: Contender, seconds: float) -> float:
    """The rate at which batches come when nobody keeps them waiting, after a start that is left out."""
    with closing(contender.batches()) as batches:  # type: ignore[type-var]
        # what was made ahead during the start is used up before the clock runs
        for _ in range(6):
            next(batches)
        started, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds or count < 3:
            next(batches)
            count += 1
        elapsed = time.perf_counter() - started
    return count * BATCH / elapsed


def floor_seconds(path: Path, images: int = 100) -> tuple[float, dict[str, float]]:
    """Seconds per image of one full decode and torch's resample of the same ten boxes, on one thread.

    The faster of two decoders, and of two memory layouts for the resample. Also returns the parts, in ms.
    """
    beton, threads = open_beton(path), torch.get_num_threads()
    ids = np.arange(min(images, beton.size))
    boxes = draw_views(VIEWS, SEED, 0, ids, beton.widths[ids], beton.heights[ids]).box
    content = [beton.read(i) for i in ids if beton.jpeg[i]]
    bytes_ = [torch.frombuffer(bytearray(c), dtype=torch.uint8) for c in content]
    torch.set_num_threads(1)
    try:
        by_torch = [decode_jpeg(b, mode=ImageReadMode.RGB) for b in bytes_]
        decodes = [
            _best(lambda: [decode_jpeg(b, mode=ImageReadMode.RGB) for b in bytes_]),
            _best(lambda: [np.asarray(Image.open(io.BytesIO(c)).convert("RGB")) for c in content]),
        ]
        resamples = []
        for layout in (torch.contiguous_format, torch.channels_last):
            pairs = list(zip([i[None].contiguous(memory_format=layout) for i in by_torch], boxes, strict=True))
            resamples.append(_best(lambda pairs=pairs: [_ten_views(image, box) for image, box in pairs]))
    finally:
        torch.set_num_threads(threads)
    decode, resample = min(decodes) / len(content), min(resamples) / len(content)
    return decode + resample, {"decode_ms": decode * 1e3, "resample_ms": resample * 1e3}


def _ten_views(image: Tensor, boxes: np.ndarray) -> list[Tensor]:
    return [
        interpolate(image[..., y : y + h, x : x + w], (size, size), mode="bicubic", antialias=True)
        for (x, y, w, h), size in zip(boxes.tolist(), view_sizes(VIEWS).tolist(), strict=True)
    ]


def _best(work: Callable[[], object], repeats: int = 2) -> float:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)
