"""An unfinished beton: grows under the name OUT.partial, and takes its own name only when whole and read back.

Beside it grows a journal with a line per image. Killed at any moment, the two can be taken up again: what the journal
lists and the file holds, by checksum, is kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from data_pipeline.beton.format import ALLOCATION, CHECKSUM_BYTES, RECORD, RECORDS_START, header_bytes
from data_pipeline.beton.images import PAGE_SIZE, Encoded
from data_pipeline.beton.manifest import Manifest, manifest_path
from data_pipeline.beton.places import Place
from data_pipeline.core.errors import DataError, UserError

_FLUSH_EVERY = 64  # images: what a kill can cost
_READ_AT_ONCE = 256  # samples per task when all is read back


def partial_path(output: Path) -> Path:
    """Where an unfinished beton grows."""
    return output.with_name(output.name + ".partial")


def journal_path(output: Path) -> Path:
    """The journal of an unfinished beton."""
    return output.with_name(output.name + ".partial.jsonl")


class BetonWriter:
    """Appends samples to an unfinished beton, in order. Close it; `publish` makes it a beton, `discard` removes it.

    capacity: samples at most. identity: what the images and options were, so that only the same is taken up again.
    """

    def __init__(self, output: Path, capacity: int, identity: dict[str, Any]) -> None:
        self.count = 0
        self.skipped: list[tuple[str, str]] = []
        self._output, self._identity, self._unflushed = output, identity, 0
        self._records, self._table = np.zeros(capacity, RECORD), np.zeros(capacity, ALLOCATION)
        self._checksums = np.zeros(capacity, np.uint32)
        self._position = -(-(RECORDS_START + self._records.nbytes) // PAGE_SIZE) * PAGE_SIZE
        # not emptied before the lock is ours: another conversion may be writing it
        descriptor = os.open(partial_path(output), os.O_RDWR | os.O_CREAT, 0o666)
        self._beton: BinaryIO = open(descriptor, "r+b")  # noqa: SIM115 (closed by `close`, as the journal)
        self._journal: TextIO | None = None
        try:
            fcntl.flock(self._beton, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._beton.close()
            raise UserError(f"{output}: another conversion is writing it") from None
        except OSError:  # a file system without locks
            pass

    @property
    def done(self) -> int:
        """Images dealt with so far, written or skipped."""
        return self.count + len(self.skipped)

    def start(self) -> None:
        """Begins with nothing."""
        self._beton.truncate(0)
        self._journal = open(journal_path(self._output), "w", encoding="utf-8")  # noqa: SIM115
        self._journal.write(json.dumps(self._identity) + "\n")

    def resume(self) -> None:
        """Takes up what an earlier, killed conversion has left. UserError when it was another one."""
        try:
            journal = open(journal_path(self._output), "r+", encoding="utf-8", newline="\n")  # noqa: SIM115
        except FileNotFoundError:
            self.start()
            return
        head = journal.readline()
        if _parsed(head) != self._identity:
            journal.close()
            raise UserError(
                f"{partial_path(self._output)}: was begun with other images or options; convert without --resume "
                "to start over"
            )
        kept = len(head.encode())
        for line in iter(journal.readline, ""):
            entry = _parsed(line)
            if entry is None or not self._take_up(entry):
                break
            kept += len(line.encode())
        journal.seek(kept)
        journal.truncate()
        self._journal = journal
        self._beton.truncate(self._position)

    def _take_up(self, entry: dict[str, Any]) -> bool:
        if "skipped" in entry:
            self.skipped.append((entry["path"], entry["skipped"]))
            return True
        size = entry["bytes"]
        self._beton.seek(entry["offset"])
        data = self._beton.read(size + CHECKSUM_BYTES)
        if len(data) != size + CHECKSUM_BYTES or zlib.crc32(data[:size]) != entry["crc32"]:
            return False
        self._enter(entry)
        return True

    def add(self, path: Place, label: int, image: Encoded, crc: int) -> None:
        """Appends a sample."""
        # no sample crosses a page: FFCV's own readers load page by page
        size = len(image.data)
        if self._position // PAGE_SIZE != (self._position + size + CHECKSUM_BYTES - 1) // PAGE_SIZE:
            self._position = -(-self._position // PAGE_SIZE) * PAGE_SIZE
        self._write_at(self._position, image.data, crc.to_bytes(CHECKSUM_BYTES, "little"))
        line = {"path": str(path), "label": label, "mode": image.mode, "width": image.width, "height": image.height}
        line |= {"offset": self._position, "bytes": size, "crc32": crc}
        self._enter(line)
        self._log(line)

    def skip(self, path: Place, reason: str) -> None:
        """Notes an image that cannot be used."""
        self.skipped.append((str(path), reason))
        self._log({"path": str(path), "skipped": reason})

    def _enter(self, line: dict[str, Any]) -> None:
        """The sample of a line of the journal, into the tables."""
        i, offset, size = self.count, line["offset"], line["bytes"]
        self._records[i] = ((line["mode"], line["width"], line["height"], offset), line["label"])
        self._table[i] = (i, offset, size)
        self._checksums[i] = line["crc32"]
        self._position = offset + size + CHECKSUM_BYTES
        self.count += 1

    def _log(self, line: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(line) + "\n")
        self._unflushed += 1
        if self._unflushed >= _FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        assert self._journal is not None
        self._journal.flush()  # after the data, which no buffer holds: the line vouches for them
        self._unflushed = 0

    def _write_at(self, position: int, *parts: bytes) -> None:
        descriptor, size = self._beton.fileno(), sum(map(len, parts))
        written = os.pwritev(descriptor, parts, position)
        while written < size:  # a disk that is nearly full takes a part, and refuses the next
            written += os.pwrite(descriptor, b"".join(parts)[written:], position + written)

    def publish(self, head: dict[str, Any], workers: int) -> int:
        """Writes the tables, reads everything back, and gives beton and manifest their names. Returns the size.

        head: the fields of `Manifest` that the writer does not know. workers: threads to read with.
        """
        records, table = self._records[: self.count].tobytes(), self._table[: self.count].tobytes()
        header = header_bytes(self.count, PAGE_SIZE, self._position)
        self._write_at(self._position, table)
        self._beton.truncate(self._position + len(table))
        self._write_at(0, header + records)
        self._flush()
        os.fsync(self._beton.fileno())
        self._read_back(header + records, workers)
        size = self._position + len(table)
        crc = zlib.crc32(table, zlib.crc32(records, zlib.crc32(header)))
        manifest = Manifest(count=self.count, bytes=size, tables_crc32=crc, **head)
        unfinished = manifest_path(self._output).with_name(manifest_path(self._output).name + ".partial")
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.write(manifest.model_dump_json(exclude_defaults=True) + "\n")
                file.writelines(self._sample_lines())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, manifest_path(self._output))
        finally:
            unfinished.unlink(missing_ok=True)
        # the beton last: without it, nothing can be mistaken for a whole data set
        os.replace(partial_path(self._output), self._output)
        _sync_folder(self._output.parent)
        self.close()
        journal_path(self._output).unlink()
        return size

    def _read_back(self, start: bytes, workers: int) -> None:
        descriptor, pointers, sizes = self._beton.fileno(), self._table["ptr"], self._table["size"]
        if os.pread(descriptor, len(start), 0) != start:
            raise DataError(f"{self._output}: its tables do not read back as they were written; is the disk sound?")

        def check(first: int) -> None:
            for i in range(first, min(first + _READ_AT_ONCE, self.count)):
                if zlib.crc32(os.pread(descriptor, int(sizes[i]), int(pointers[i]))) != self._checksums[i]:
                    raise DataError(
                        f"{self._output}: sample {i} does not read back as it was written; is the disk sound?"
                    )

        with ThreadPoolExecutor(workers, thread_name_prefix="read back") as pool:
            # consumed, so that the first error is raised here
            for _ in pool.map(check, range(0, self.count, _READ_AT_ONCE)):
                pass

    def _sample_lines(self) -> Iterator[str]:
        with open(journal_path(self._output), encoding="utf-8") as journal:
            next(journal)
            yield from (line for line in journal if '"skipped":' not in line or "skipped" not in json.loads(line))

    def close(self) -> None:
        """Closes the files and leaves them where they are."""
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            self._beton.close()

    def discard(self) -> None:
        """Removes what has been written."""
        self.close()
        for path in (partial_path(self._output), journal_path(self._output)):
            path.unlink(missing_ok=True)


def _parsed(line: str) -> dict[str, Any] | None:
    """The object on a line, None where the line is not whole."""
    if not line.endswith("\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
