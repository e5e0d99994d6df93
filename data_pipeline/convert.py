"""Image folders to a beton: parallel, bounded in memory, published under its name only when whole and verified."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import PIL

from data_pipeline.beton import ALLOCATION, CHECKSUM_BYTES, RECORD, RECORDS_START, header_bytes
from data_pipeline.errors import UserError
from data_pipeline.images import PAGE_SIZE, Encoded, Mode, Unusable, encode
from data_pipeline.manifest import FORMAT, Manifest, manifest_path
from data_pipeline.sources import Listing, list_images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConvertOptions:
    """How images are stored.

    mode: `original` keeps the bytes of upright RGB and grey JPEGs and re-encodes only what has to be; `jpg` re-encodes
    all at `quality`; `raw` stores pixels. max_resolution: longest side in pixels, larger images are shrunk (bicubic).
    subset, seed: keep that part of each class. strict: any image that cannot be used is an error. workers: threads.
    """

    mode: Mode = "original"
    max_resolution: int | None = None
    quality: int = 90
    subset: float | None = None
    seed: int = 0
    strict: bool = False
    overwrite: bool = False
    workers: int | None = None


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did; `bytes` is the size of the beton."""

    written: int
    skipped: tuple[Skipped, ...]
    bytes: int
    seconds: float
    output: str


def convert(
    sources: Sequence[Path], output: Path, options: ConvertOptions | None = None, progress: Progress | None = None
) -> ConvertReport:
    """Writes the images below `sources` to the beton `output` and its manifest.

    `progress(done, total)` is called as images are finished. Raises UserError for anything the user can mend: missing
    or empty folders, an existing output, a full disk, with `strict` an unusable image.
    """
    options = options or ConvertOptions()
    started = time.monotonic()
    _check_options(options, output)
    listing = list_images(sources, options.subset, options.seed)
    _check_space(listing, output, options)
    beton_partial = output.with_name(output.name + ".partial")
    lines_partial = manifest_path(output).with_name(manifest_path(output).name + ".partial")
    try:
        with open(beton_partial, "wb") as beton, open(lines_partial, "w", encoding="utf-8") as lines:
            writer = _Writer(beton, lines, len(listing.paths))
            skipped = _write_all(writer, listing, options, progress)
            if not writer.count:
                raise UserError(f"{output}: none of the {len(listing.paths)} images could be used; {_first(skipped)}")
            size, crc = writer.finish()
        head = Manifest(
            format=FORMAT,
            count=writer.count,
            bytes=size,
            tables_crc32=crc,
            classes=listing.classes,
            sources=tuple(str(source) for source in sources),
            options={k: v for k, v in asdict(options).items() if k not in ("workers", "overwrite")},
            versions={"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__},
        )
        _publish(output, beton_partial, lines_partial, head)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{output}: the disk is full; free some space or choose another place") from None
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        beton_partial.unlink(missing_ok=True)
        lines_partial.unlink(missing_ok=True)
    return ConvertReport(writer.count, skipped, size, time.monotonic() - started, str(output))


class _Writer:
    """Appends samples to an unfinished beton and its sample lines."""

    def __init__(self, beton: BinaryIO, lines: TextIO, capacity: int) -> None:
        self._beton, self._lines = beton, lines
        self._records = np.zeros(capacity, RECORD)
        self._table = np.zeros(capacity, ALLOCATION)
        self.count = 0
        tables_end = RECORDS_START + self._records.nbytes
        self._position = -(-tables_end // PAGE_SIZE) * PAGE_SIZE
        beton.seek(self._position)

    def add(self, path: Path, label: int, image: Encoded, crc: int) -> None:
        # no sample crosses a page: FFCV's own readers load page by page
        needed = len(image.data) + CHECKSUM_BYTES
        if self._position // PAGE_SIZE != (self._position + needed - 1) // PAGE_SIZE:
            self._position = -(-self._position // PAGE_SIZE) * PAGE_SIZE
            self._beton.seek(self._position)
        self._beton.write(image.data)
        self._beton.write(crc.to_bytes(CHECKSUM_BYTES, "little"))
        i = self.count
        self._records[i] = ((image.mode, image.width, image.height, self._position), label)
        self._table[i] = (i, self._position, len(image.data))
        line = {"path": str(path), "label": label, "mode": image.mode, "width": image.width, "height": image.height}
        line |= {"offset": self._position, "bytes": len(image.data), "crc32": crc}
        self._lines.write(json.dumps(line, ensure_ascii=True) + "\n")
        self._position += needed
        self.count += 1

    def finish(self) -> tuple[int, int]:
        """Writes the tables; returns the size of the file and the checksum of header and tables."""
        records, table = self._records[: self.count].tobytes(), self._table[: self.count].tobytes()
        header = header_bytes(self.count, PAGE_SIZE, self._position)
        self._beton.write(table)
        self._beton.seek(0)
        self._beton.write(header + records)
        for file in (self._beton, self._lines):
            file.flush()
            os.fsync(file.fileno())
        return self._position + len(table), zlib.crc32(table, zlib.crc32(records, zlib.crc32(header)))


def _write_all(
    writer: _Writer, listing: Listing, options: ConvertOptions, progress: Progress | None
) -> tuple[Skipped, ...]:
    skipped: list[Skipped] = []
    total = len(listing.paths)
    for index, result in enumerate(_encoded(listing.paths, options)):
        path = listing.paths[index]
        if isinstance(result, str):
            if options.strict:
                raise UserError(f"{path}: {result} (strict: every image must be usable)")
            skipped.append(Skipped(str(path), result))
        else:
            writer.add(path, listing.labels[index], *result)
        if progress:
            progress(index + 1, total)
    return tuple(skipped)


def _encoded(paths: Sequence[Path], options: ConvertOptions) -> Iterator[tuple[Encoded, int] | str]:
    """The images in order, encoded by threads that run a bounded number of them ahead; a text where unusable."""

    def work(path: Path) -> tuple[Encoded, int] | str:
        try:
            image = encode(path, options.mode, options.max_resolution, options.quality)
        except Unusable as reason:
            return str(reason)
        return image, zlib.crc32(image.data)

    workers = options.workers or len(os.sched_getaffinity(0))
    pending: deque[Future[tuple[Encoded, int] | str]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            for path in paths:
                pending.append(pool.submit(work, path))
                if len(pending) > 8 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _check_options(options: ConvertOptions, output: Path) -> None:
    if options.mode not in ("original", "jpg", "raw"):
        raise UserError(f"mode {options.mode}: expected original, jpg or raw")
    if not 1 <= options.quality <= 100:
        raise UserError(f"quality {options.quality}: expected 1 to 100")
    if options.max_resolution is not None and options.max_resolution < 1:
        raise UserError(f"max_resolution {options.max_resolution}: expected at least 1 pixel")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"workers {options.workers}: expected at least 1")
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give the name of the beton to write")
    if output.exists() and not options.overwrite:
        raise UserError(f"{output}: exists already; remove it, or overwrite it with --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output.parent}: cannot be made: {error.strerror}") from None


def _check_space(listing: Listing, output: Path, options: ConvertOptions) -> None:
    """In original mode the size is known beforehand, so a disk that is too small is told at once."""
    if options.mode != "original" or options.max_resolution is not None:
        return
    needed = 0
    for path in listing.paths:
        try:
            needed += path.stat().st_size
        except OSError:
            continue  # it will be reported as skipped
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(f"{output}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left")


def _publish(output: Path, beton_partial: Path, lines_partial: Path, head: Manifest) -> None:
    """Puts both files under their names, the beton last: without it, nothing can be mistaken for a whole data set."""
    manifest_partial = lines_partial.with_name(manifest_path(output).name + ".head.partial")
    try:
        with open(manifest_partial, "wb") as file, open(lines_partial, "rb") as lines:
            file.write(head.model_dump_json().encode() + b"\n")
            shutil.copyfileobj(lines, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(manifest_partial, manifest_path(output))
    finally:
        manifest_partial.unlink(missing_ok=True)
    os.replace(beton_partial, output)
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _first(skipped: Sequence[Skipped]) -> str:
    return f"the first: {skipped[0].path}: {skipped[0].reason}"
