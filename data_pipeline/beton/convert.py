"""Images to a beton: parallel, bounded in memory, published under its name only when whole and read back."""

from __future__ import annotations

import errno
import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from data_pipeline.beton.encoding import Forecast, Result, default_workers, encoded, forecast
from data_pipeline.beton.images import Mode, Storage
from data_pipeline.beton.manifest import FORMAT
from data_pipeline.beton.sources import Listing, list_images
from data_pipeline.beton.tables import Columns
from data_pipeline.beton.writer import BetonWriter, partial_path
from data_pipeline.core.errors import UserError

Progress = Callable[[int, int], None]

# a forecast from a sample may be off by so much
_FORECAST_ERROR = 0.1
# pixels of 16 bits of which none needs more than so many are not of 16
_BRIGHT_BITS = 14


@dataclass(frozen=True)
class ConvertOptions:
    """How images are stored.

    mode: `original` keeps the bytes of upright RGB and grey JPEGs and re-encodes only what has to be; `jpg` re-encodes
    all at `quality`; `raw` stores pixels. max_resolution: longest side in pixels, larger images are shrunk (bicubic).
    channels: 3 is RGB and 1 grey, made from whatever an image is; with any other number images must have as many, and
    their pixels are stored. bits: how many of 16-bit pixels are used, where the files do not say. image_column,
    label_column: of tables. subset, seed: keep that part of each class. strict: any image that cannot be used is an
    error. overwrite: replace an existing beton. resume: continue where a conversion of the same was killed. workers:
    threads.
    """

    mode: Mode = "original"
    max_resolution: int | None = None
    quality: int = 90
    channels: int = 3
    bits: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    subset: float | None = None
    seed: int = 0
    strict: bool = False
    overwrite: bool = False
    resume: bool = False
    workers: int | None = None


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did; `bytes` is the size of the beton, `unlabelled` counts images that lie in no class."""

    written: int
    skipped: tuple[Skipped, ...]
    bytes: int
    seconds: float
    output: str
    classes: tuple[str, ...]
    unlabelled: int


def convert(
    sources: Sequence[Path],
    output: Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    announce: Callable[[Forecast], None] | None = None,
) -> ConvertReport:
    """Writes the images of `sources` (see `list_images`) to the beton `output` and its manifest.

    `announce` is told size and time before the start, `progress(done, total)` is called as images are finished. Raises
    UserError for anything the user can mend: missing or empty sources, an existing output, a full disk, with `strict`
    an unusable image. A conversion that is interrupted leaves `OUT.partial` for `resume`; after a mistake nothing.
    """
    options = options or ConvertOptions()
    started = time.monotonic()
    _check_options(options, output)
    columns = Columns(options.image_column, options.label_column)
    listing = list_images(sources, options.subset, options.seed, channels=options.channels, columns=columns)
    storage = Storage(options.mode, options.max_resolution, options.quality, options.channels, options.bits)
    workers = options.workers or default_workers()
    stored = {k: v for k, v in asdict(options).items() if k not in ("workers", "overwrite", "resume", "strict")}
    with _told_of_full_disks(output):
        writer = BetonWriter(output, len(listing.paths), {"options": stored, "images": _digest(listing)})
        try:
            if options.resume:
                writer.resume()
            else:
                writer.start()
            expected = forecast(listing.paths[writer.done :], storage, workers, output.parent)
            _refuse_small_disk(expected, output)
            if not options.resume:
                _refuse_dark(expected.peak)
            if announce:
                announce(expected)
            results = encoded(listing.paths[writer.done :], storage, workers)
            _write_all(writer, listing, results, options.strict, progress)
            skipped = tuple(Skipped(path, reason) for path, reason in writer.skipped)
            if not writer.count:
                first = f"the first: {skipped[0].path}: {skipped[0].reason}"
                raise UserError(f"{output}: none of the {len(listing.paths)} images could be used; {first}")
            versions = {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__}
            head: dict[str, Any] = {"format": FORMAT, "classes": listing.classes, "versions": versions}
            head |= {"channels": options.channels, "sources": tuple(map(str, sources)), "options": stored}
            size = writer.publish(head, workers)
        except UserError:
            # what an earlier conversion has left is not thrown away for a mistake in resuming it
            if not options.resume:
                writer.discard()
            raise
        finally:
            writer.close()
    seconds, unlabelled = time.monotonic() - started, sum(label < 0 for label in listing.labels)
    return ConvertReport(writer.count, skipped, size, seconds, str(output), listing.classes, unlabelled)


@contextmanager
def _told_of_full_disks(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
        raise UserError(
            f"{output}: the disk is full; free some space and continue with --resume, or remove {partial_path(output)}"
        ) from None


def _write_all(
    writer: BetonWriter, listing: Listing, results: Iterator[Result], strict: bool, progress: Progress | None
) -> None:
    total = len(listing.paths)
    for index, result in enumerate(results, start=writer.done):
        path = listing.paths[index]
        if not isinstance(result, str):
            writer.add(path, listing.labels[index], *result)
        elif strict:
            raise UserError(f"{path}: {result} (strict: every image must be usable)")
        else:
            writer.skip(path, result)
        if progress:
            progress(index + 1, total)
    if strict and writer.skipped:  # before it was resumed
        first, reason = writer.skipped[0]
        raise UserError(f"{first}: {reason} (strict: every image must be usable)")


def _refuse_small_disk(expected: Forecast, output: Path) -> None:
    if expected.bytes * (1.0 - _FORECAST_ERROR) > expected.free_bytes:
        needed, free = expected.bytes / 1e9, expected.free_bytes / 1e9
        raise UserError(f"{output}: needs about {needed:.2f} GB, the disk has {free:.2f} GB left")


def _refuse_dark(peak: int | None) -> None:
    """UserError where 16-bit images look as if they used fewer bits: nearly black, and noticed after training."""
    if peak is not None and 0 < peak < 1 << _BRIGHT_BITS:
        bits = max(peak.bit_length(), 8)
        bits += bits % 2  # of cameras and microscopes: 8, 10, 12, 14
        raise UserError(
            f"images of 16 bits hold no value above {peak} (of those looked at), and would come out dark: give --bits "
            f"{bits} if that is what they use of 16, or --bits 16 to take them as they are"
        )


def _digest(listing: Listing) -> str:
    """What a conversion is of: paths, labels and classes, in order."""
    digest = hashlib.sha256(repr(listing.classes).encode())
    for path, label in zip(listing.paths, listing.labels, strict=True):
        digest.update(f"{path!s}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _check_options(options: ConvertOptions, output: Path) -> None:
    if options.mode not in ("original", "jpg", "raw"):
        raise UserError(f"mode {options.mode}: expected original, jpg or raw")
    if not 1 <= options.quality <= 100:
        raise UserError(f"quality {options.quality}: expected 1 to 100")
    if options.max_resolution is not None and options.max_resolution < 1:
        raise UserError(f"max_resolution {options.max_resolution}: expected at least 1 pixel")
    if options.channels < 1:
        raise UserError(f"channels {options.channels}: expected at least 1")
    if options.bits is not None and not 1 <= options.bits <= 16:
        raise UserError(f"bits {options.bits}: expected 1 to 16")
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
