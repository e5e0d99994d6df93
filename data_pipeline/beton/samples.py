"""Samples as pixels, from a beton or an image folder, without FFCV."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.beton.format import BetonInfo, open_beton
from data_pipeline.beton.manifest import manifest_path
from data_pipeline.beton.pixels import Unusable, decode, pixels
from data_pipeline.beton.places import read
from data_pipeline.beton.sources import list_images
from data_pipeline.core.errors import DataError, UserError


class Samples(Protocol):
    """A data set by sample id."""

    size: int
    channels: int
    num_classes: int
    classes: tuple[str, ...]
    labels: NDArray[np.int64]

    def fingerprint(self) -> str:
        """The same for the same images and labels in the same order, and for nothing else."""
        ...

    def pixels(self, sample_id: int) -> NDArray[np.uint8]:
        """The sample, upright: uint8 `[H, W, channels]`. Raises DataError naming it when it cannot be decoded."""
        ...

    def image(self, sample_id: int) -> Image.Image:
        """The sample to be looked at, in RGB: of more than three channels the first three, of two the first."""
        values = self.pixels(sample_id)
        return Image.fromarray(values[..., :3] if self.channels >= 3 else values[..., 0]).convert("RGB")


class BetonSamples(Samples):
    """The samples of a beton."""

    def __init__(self, beton: BetonInfo) -> None:
        self.beton = beton
        self.size, self.num_classes, self.labels = beton.size, beton.num_classes, beton.labels
        self.channels = beton.channels
        self.classes = beton.manifest.classes

    def fingerprint(self) -> str:
        """A digest of the manifest, which has the checksum of every sample."""
        with open(manifest_path(self.beton.path), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def pixels(self, sample_id: int) -> NDArray[np.uint8]:
        """The sample as stored."""
        data = self.beton.read(sample_id)
        width, height = int(self.beton.widths[sample_id]), int(self.beton.heights[sample_id])
        if not self.beton.jpeg[sample_id]:
            return np.frombuffer(data, np.uint8).reshape(height, width, self.channels)
        try:
            image = decode(data)
        except Unusable as reason:
            raise DataError(f"{self.beton.describe(sample_id)}: {reason}") from None
        if image.size != (width, height):
            raise DataError(f"{self.beton.describe(sample_id)}: its size is not what the beton says")
        return np.asarray(image.convert("RGB")) if self.channels == 3 else np.asarray(image.convert("L"))[..., None]


class FolderSamples(Samples):
    """The images of a folder, in the order in which they would be converted."""

    def __init__(self, folder: Path, channels: int) -> None:
        listing = list_images([folder], channels=channels)
        self._paths = [path for path in listing.paths if isinstance(path, Path)]
        if len(self._paths) < len(listing.paths):
            raise UserError(f"{folder}: holds archives or tables; make a beton of it: mokd convert {folder} OUT.beton")
        self.channels = channels
        self.size, self.num_classes, self.classes = len(self._paths), len(listing.classes), listing.classes
        self.labels = np.asarray(listing.labels, np.int64)

    def fingerprint(self) -> str:
        """A digest of paths, labels, sizes and times of change; the images themselves are not read."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for path, label in zip(self._paths, self.labels.tolist(), strict=True):
            state = path.stat()
            digest.update(f"{path!s}\0{label}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def pixels(self, sample_id: int) -> NDArray[np.uint8]:
        """The image, upright."""
        path = self._paths[sample_id]
        try:
            return pixels(read(path), None, self.channels, None).values
        except Unusable as reason:
            hint = "convert the folder to leave such images out"
            raise DataError(f"{path}: sample {sample_id}: {reason}; {hint}") from None


def open_samples(path: Path, channels: int = 3) -> Samples:
    """The samples of a beton, or of an image folder, with so many channels. UserError when there are none of these."""
    if path.is_dir():
        return FolderSamples(path, channels)
    samples = BetonSamples(open_beton(path))
    if samples.channels != channels:
        raise UserError(
            f"{path}: its images have {samples.channels} channels, data.channels is {channels}: set it to "
            f"{samples.channels}, or convert again with --channels {channels}"
        )
    return samples
