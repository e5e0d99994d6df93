"""Samples as Pillow images, from a beton or an image folder, without FFCV."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.beton.format import BetonInfo, open_beton
from data_pipeline.beton.images import Unusable, decode, upright_rgb
from data_pipeline.beton.manifest import manifest_path
from data_pipeline.beton.sources import list_images
from data_pipeline.core.errors import DataError


class Samples(Protocol):
    """A data set by sample id."""

    size: int
    num_classes: int
    classes: tuple[str, ...]
    labels: NDArray[np.int64]

    def fingerprint(self) -> str:
        """The same for the same images and labels in the same order, and for nothing else."""
        ...

    def image(self, sample_id: int) -> Image.Image:
        """The sample as an upright RGB image. Raises DataError naming it when it cannot be decoded."""
        ...


class BetonSamples:
    """The samples of a beton."""

    def __init__(self, beton: BetonInfo) -> None:
        self.beton = beton
        self.size, self.num_classes, self.labels = beton.size, beton.num_classes, beton.labels
        self.classes = beton.manifest.classes

    def fingerprint(self) -> str:
        """A digest of the manifest, which has the checksum of every sample."""
        with open(manifest_path(self.beton.path), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def image(self, sample_id: int) -> Image.Image:
        """The sample as stored, in RGB."""
        data = self.beton.read(sample_id)
        size = (int(self.beton.widths[sample_id]), int(self.beton.heights[sample_id]))
        if not self.beton.jpeg[sample_id]:
            return Image.frombytes("RGB", size, data)
        try:
            image = decode(data)
        except Unusable as reason:
            raise DataError(f"{self.beton.describe(sample_id)}: {reason}") from None
        if image.size != size:
            raise DataError(f"{self.beton.describe(sample_id)}: its size is not what the beton says")
        return image.convert("RGB")


class FolderSamples:
    """The images of a folder, in the order in which they would be converted."""

    def __init__(self, folder: Path) -> None:
        listing = list_images([folder])
        self._paths = listing.paths
        self.size, self.num_classes, self.classes = len(listing.paths), len(listing.classes), listing.classes
        self.labels = np.asarray(listing.labels, np.int64)

    def fingerprint(self) -> str:
        """A digest of paths, labels, sizes and times of change; the images themselves are not read."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for path, label in zip(self._paths, self.labels.tolist(), strict=True):
            state = path.stat()
            digest.update(f"{path!s}\0{label}\0{state.st_size}\0{state.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def image(self, sample_id: int) -> Image.Image:
        """The image, upright and in RGB."""
        path = self._paths[sample_id]
        try:
            return upright_rgb(decode(path.read_bytes()))
        except (Unusable, OSError) as reason:
            hint = "convert the folder to leave such images out"
            raise DataError(f"{path}: sample {sample_id}: {reason}; {hint}") from None


def open_samples(path: Path) -> Samples:
    """The samples of a beton, or of an image folder. Raises UserError when there are none."""
    return FolderSamples(path) if path.is_dir() else BetonSamples(open_beton(path))
