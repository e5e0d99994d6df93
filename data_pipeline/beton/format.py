"""The beton file: FFCV's format, read and written without FFCV, and refused when it is not whole.

Layout: header, field descriptions, one record per sample, data in pages, and a table of where the data of each sample
lie. Stock FFCV reads these files. Beyond its format, the four bytes after the data of a sample hold their CRC-32, so
that a loader can check what it reads.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.beton.manifest import Manifest, manifest_path, read_manifest
from data_pipeline.core.errors import DataError, UserError

VERSION = 2
MODE_JPEG, MODE_RAW = 0, 1
CHECKSUM_BYTES = 4
MAX_SIDE = 65535

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
RECORD = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
RECORDS_START = HEADER.itemsize + 2 * FIELD.itemsize

_FIELD_TYPES = {"image": 2, "label": 1}


@dataclass(frozen=True)
class BetonInfo:
    """A beton that passed the quick checks. Arrays have one entry per sample.

    widths, heights: int64 pixels. labels: int64, -1 for none. jpeg: uint8, 0 means raw pixels, row by row.
    offsets, sizes: uint64, where the data lie in the file.
    """

    path: Path
    manifest: Manifest
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    labels: NDArray[np.int64]
    jpeg: NDArray[np.uint8]
    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint64]

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Of the pixels: 3 is RGB, 1 grey. JPEGs are of these two alone."""
        return self.manifest.channels

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 when the samples have no labels."""
        return len(self.manifest.classes)

    def read(self, sample_id: int) -> bytes:
        """The stored bytes of a sample, checked. Raises DataError naming the sample."""
        size = int(self.sizes[sample_id])
        try:
            with open(self.path, "rb") as file:
                file.seek(int(self.offsets[sample_id]))
                data = file.read(size + CHECKSUM_BYTES)
        except OSError as error:
            raise DataError(f"{self.describe(sample_id)}: cannot be read: {error.strerror}") from None
        if len(data) != size + CHECKSUM_BYTES:
            raise DataError(f"{self.describe(sample_id)}: the file ends before the sample does")
        if zlib.crc32(data[:size]) != int.from_bytes(data[size:], "little"):
            raise DataError(f"{self.describe(sample_id)}: its bytes are not those that were written")
        return data[:size]

    def describe(self, sample_id: int) -> str:
        """`train.beton: sample 17 (n01440764/x.JPEG)`, for messages."""
        source = self.manifest.source_of(self.path, sample_id)
        return f"{self.path}: sample {sample_id}" + (f" ({source})" if source else "")


def header_bytes(num_samples: int, page_size: int, table: int) -> bytes:
    """The start of a beton: header and field descriptions."""
    header = np.zeros((), HEADER)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(_FIELD_TYPES), page_size
    header["num_samples"], header["table"] = num_samples, table
    fields = np.zeros(len(_FIELD_TYPES), FIELD)
    for field, (name, kind) in zip(fields, _FIELD_TYPES.items(), strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return header.tobytes() + fields.tobytes()


def open_beton(path: Path) -> BetonInfo:
    """The tables of a beton and its manifest, after the quick checks: version, length, checksums of the tables.

    Raises UserError with one line when the file is missing, of another version, cut off, or not what its manifest says.
    """
    try:
        length = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(RECORDS_START)
            if len(start) < HEADER.itemsize:
                raise UserError(f"{path}: not a beton: only {length} bytes long; convert the images again")
            header = np.frombuffer(start, HEADER, 1)[0]
            _check_header(path, header, start)
            manifest = read_manifest(path)
            if length != manifest.bytes:
                state = "cut off" if length < manifest.bytes else "longer than written"
                raise UserError(f"{path}: {state}: {length} bytes instead of {manifest.bytes}; convert it again")
            records = _table(file, RECORD, RECORDS_START, int(header["num_samples"]), length, path)
            table = _table(file, ALLOCATION, int(header["table"]), int(header["num_samples"]), length, path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such beton; make one with: mokd convert IMAGE_FOLDER {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    found = zlib.crc32(table.tobytes(), zlib.crc32(records.tobytes(), zlib.crc32(start)))
    if found != manifest.tables_crc32 or len(records) != manifest.count:
        raise UserError(f"{path}: does not match its manifest {manifest_path(path).name}; convert it again")
    image: Any = records["image"]
    return BetonInfo(
        path=path,
        manifest=manifest,
        widths=image["width"].astype(np.int64),
        heights=image["height"].astype(np.int64),
        labels=records["label"].astype(np.int64),
        jpeg=(image["mode"] == MODE_JPEG).astype(np.uint8),
        offsets=image["data_ptr"].astype(np.uint64),
        sizes=table["size"].astype(np.uint64),
    )


def _check_header(path: Path, header: Any, start: bytes) -> None:
    version, num_fields = int(header["version"]), int(header["num_fields"])
    if version != VERSION:
        raise UserError(f"{path}: beton version {version}, this program reads {VERSION}; convert the images again")
    fields: Any = np.frombuffer(start, FIELD, offset=HEADER.itemsize) if len(start) == RECORDS_START else []
    kinds = {bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace"): int(field["type"]) for field in fields}
    if num_fields != len(_FIELD_TYPES) or kinds != _FIELD_TYPES:
        raise UserError(f"{path}: its fields are not an image and a label; convert the images with mokd convert")


def _table(file: Any, kind: np.dtype[Any], offset: int, count: int, length: int, path: Path) -> NDArray[Any]:
    if offset + count * kind.itemsize > length:
        raise UserError(f"{path}: cut off: its tables reach beyond the end of the file; convert it again")
    file.seek(offset)
    return np.frombuffer(file.read(count * kind.itemsize), kind)
