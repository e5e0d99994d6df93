"""The reference loader's processes end with the one that they read for, however that ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

# reads an epoch, and leaves as ranks do: without tearing the interpreter down
PROGRAM = """
import os, sys, warnings
from pathlib import Path
from data_pipeline.config import CropConfig, DataConfig, ViewsConfig
from data_pipeline.core.errors import DataError
from data_pipeline.loaders.build import build_loader

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of workers and cores, here alone: -W would reach the resource tracker too
    data = DataConfig(train=Path(sys.argv[1]), backend="torchvision", workers=2)
    crops = CropConfig(count=1, size_px=16, area_scale=(0.5, 1.0), blur_probability=(0.0,))
    views = ViewsConfig(global_crops=crops, local_crops=crops)
    try:
        for batch in build_loader(data, views, seed=0, rank=0, world_size=1, global_batch=4).epoch(0):
            print("batch", flush=True)
            if "wait" in sys.argv:
                import time
                time.sleep(600)
    except DataError as error:
        print(error, flush=True)
        os._exit(1)
"""


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    # all that it starts (workers, the fork server, the resource tracker) inherits the pipe, which ends with the last
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_none_outlives_a_damaged_image(picture_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(picture_folder, tmp_path / "pictures")
    damaged = folder / "class_1" / "07.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    process = start(folder)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "07.jpg" in said.splitlines()[-1]  # nothing is said after it, of queues that were left


def test_none_outlives_a_killed_rank(picture_folder: Path) -> None:
    process = start(picture_folder, "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert set(said.splitlines()) <= {"batch"}  # nothing of semaphores that it has left
