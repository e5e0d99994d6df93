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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.beton.format import CHECKSUM_BYTES
from data_pipeline.beton.images import Encoded, Storage, encode
from data_pipeline.beton.pixels import Unusable
from data_pipeline.beton.places import Place

_AHEAD = 8  # images per thread that may be finished before their turn
_PROBE_IMAGES = 64

Result = tuple[Encoded, int] | str


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

    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            for path in paths:
                pending.append(pool.submit(work, path))
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
