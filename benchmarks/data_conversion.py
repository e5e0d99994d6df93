"""Conversion against FFCV's own writer, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.core.errors import DataError

_OURS = """
import sys, time
from pathlib import Path
from data_pipeline.beton.convert import ConvertOptions, convert
source, output, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
started = time.perf_counter()
report = convert([source], output, ConvertOptions(mode="original", workers=workers))
print(report.written / (time.perf_counter() - started))
"""

_FFCV = """
import sys, time
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder
source, output, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
started = time.perf_counter()
images = ImageFolder(source)
fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
DatasetWriter(output, fields, num_workers=workers).from_indexed_dataset(images)
print(len(images) / (time.perf_counter() - started))
"""


def ours(source: Path, workers: int) -> float:
    """Images per second of `mokd convert` in original mode: read, checked, written, synced, read back."""
    return _run(_OURS, source, workers)


def ffcv_writer(source: Path, workers: int) -> float:
    """Images per second of FFCV's DatasetWriter re-encoding the folder at quality 90."""
    return _run(_FFCV, source, workers)


def _run(program: str, source: Path, workers: int) -> float:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-c", program, str(source), str(Path(folder) / "out.beton"), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise DataError(f"benchmark: a conversion failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])
