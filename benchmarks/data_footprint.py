"""Memory, first-batch latency and growth of a loader, each measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.beton.format import ALLOCATION, CHECKSUM_BYTES, MODE_RAW, RECORD, RECORDS_START, header_bytes
from data_pipeline.beton.images import PAGE_SIZE
from data_pipeline.beton.manifest import FORMAT, Manifest, manifest_path
from data_pipeline.core.errors import DataError

IMAGENET_SAMPLES = 1_281_167

_LOADER = """
import json, sys, time
started = time.time()
from pathlib import Path
def memory():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
def state():
    import os, threading
    return {"rss_mb": memory(), "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.loaders.build import build_loader
import data_pipeline.loaders.ffcv
path, job, batch, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) or None
found = {"imports_s": time.time() - started, "imports_mb": memory()}
data = DataConfig(train=path, workers=2, batches_ahead=3, limit=limit)
def build():
    return build_loader(data, ViewsConfig(), seed=0, rank=0, world_size=1, global_batch=batch)
loader = build()
found["loader_mb"] = memory() - found["imports_mb"]
batches = loader.epoch(0)
next(batches)
found["first_batch_s"] = time.time() - started
"""
_MEMORY = """
for _ in range(4): next(batches)
found["running_mb"] = memory() - found["imports_mb"]
second = build()
more = second.epoch(0)
for _ in range(5): next(more)
found["second_loader_mb"] = memory() - found["imports_mb"] - found["running_mb"]
print(json.dumps(found))
"""
_GROWTH = """
batches.close()
for epoch in range(50):
    for views in loader.epoch(epoch): pass
    if epoch == 9: found["epoch_10"] = state()
found["epoch_50"] = state()
print(json.dumps(found))
"""


def memory(path: Path, batch: int = 64) -> dict[str, Any]:
    """MB of resident memory that one loader and a second one add, and seconds to the first batch."""
    return _run(_LOADER + _MEMORY, path, "memory", batch, 0)


def growth(path: Path) -> dict[str, Any]:
    """Resident memory, threads and open files after 10 and after 50 epochs."""
    return _run(_LOADER + _GROWTH, path, "growth", 16, 64)


def first_batch_seconds(path: Path) -> list[float]:
    """Seconds from the start of a process to its first batch, imports included, for two processes in turn."""
    return [memory(path, 32)["first_batch_s"] for _ in range(2)]


def tiny_beton(path: Path, samples: int = IMAGENET_SAMPLES) -> Path:
    """A beton of so many raw images of one pixel: the tables of a large data set without its data."""
    stride = 3 + CHECKSUM_BYTES
    start = -(-(RECORDS_START + samples * RECORD.itemsize) // PAGE_SIZE) * PAGE_SIZE
    per_page = PAGE_SIZE // stride
    index = np.arange(samples)
    places = start + index // per_page * PAGE_SIZE + index % per_page * stride
    records, table = np.zeros(samples, RECORD), np.zeros(samples, ALLOCATION)
    image: Any = records["image"]
    image["mode"], image["width"], image["height"], image["data_ptr"] = MODE_RAW, 1, 1, places
    records["label"] = index * 1000 // samples
    table["sample_id"], table["ptr"], table["size"] = index, places, 3
    pixel = b"\x10\x20\x30"
    page = (pixel + zlib.crc32(pixel).to_bytes(CHECKSUM_BYTES, "little")) * per_page
    end = -(-int(places[-1] + stride) // PAGE_SIZE) * PAGE_SIZE
    header = header_bytes(samples, PAGE_SIZE, end)
    with open(path, "wb") as file:
        file.write(header + records.tobytes())
        for offset in range(start, end, PAGE_SIZE):
            file.seek(offset)
            file.write(page)
        file.seek(end)
        file.write(table.tobytes())
        size = file.tell()
    crc = zlib.crc32(table.tobytes(), zlib.crc32(records.tobytes(), zlib.crc32(header)))
    head = Manifest(
        format=FORMAT,
        count=samples,
        bytes=size,
        tables_crc32=crc,
        classes=tuple(str(i) for i in range(1000)),
        sources=(),
        options={},
        versions={},
    )
    manifest_path(path).write_text(head.model_dump_json() + "\n")
    return path


def _run(program: str, path: Path, job: str, batch: int, limit: int) -> dict[str, Any]:
    command = [sys.executable, "-c", program, str(path), job, str(batch), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise DataError(f"benchmark: a loader failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
