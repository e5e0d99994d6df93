"""Images to what a beton stores of them, by threads, in order; and how long and how large the whole will be.

Threads, not processes: decoders and encoders release the interpreter's lock, and a worker cannot die alone and leave
the others waiting for it. One that fails in a way nobody foresaw ends the conversion with its exception.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_pipeline.beton.format import CHECKSUM_BYTES
from data_pipeline.beton.images import Encoded, Storage, encode
from data_pipeline.beton.pixels import Unusable
from data_pipeline.beton.places import Place

_AHEAD = 8  # images per thread that may be finished before their turn
_PROBE_IMAGES = 64

Result = tuple[Encoded, int] | str
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Forecast:
    """What a conversion will take, from a sample of its images. free_bytes: what the disk has left.

    peak: the largest value of 16-bit images in the sample that do not say how many bits they use; None without any.
    """

    images: int
    bytes: int
    seconds: float
    workers: int
    free_bytes: int
    peak: int | None


def encoded(paths: Sequence[Place], storage: Storage, workers: int) -> Iterator[Result]:
    """The images in order with their CRC-32; a text where one is unusable. Bounded in memory."""

    def work(path: Place) -> Result:
        try:
            image = encode(path, storage)
        except Unusable as reason:
            return str(reason)
        return image, zlib.crc32(image.data)

    yield from in_threads(work, paths, workers)


def in_threads(work: Callable[[Item], Made], items: Iterable[Item], workers: int) -> Iterator[Made]:
    """What `work` makes of every item, in order; a few of them are made ahead, so memory is bounded."""
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="images") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def forecast(paths: Sequence[Place], storage: Storage, workers: int, folder: Path) -> Forecast:
    """The size and time of converting `paths` to `folder`, from a few of them spread evenly."""
    count = min(len(paths), max(workers, min(_PROBE_IMAGES, len(paths) // 50)))
    probe = [paths[i * len(paths) // count] for i in range(count)] if count else []
    started = time.monotonic()
    usable = [result for result in encoded(probe, storage, workers) if not isinstance(result, str)]
    seconds = time.monotonic() - started
    size = sum(len(image.data) + CHECKSUM_BYTES for image, _ in usable)
    part = len(paths) / max(count, 1)
    free = shutil.disk_usage(folder).free
    peak = max((image.peak for image, _ in usable if image.peak is not None), default=None)
    return Forecast(len(paths), round(size * part), seconds * part, workers, free, peak)


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))
