"""What a loader needs and gives back: memory, threads, files, cores; and disks that fail."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.beton.convert import convert
from data_pipeline.beton.format import open_beton
from data_pipeline.config import CropConfig, DataConfig, ViewsConfig
from data_pipeline.core.errors import DataError
from data_pipeline.core.native_library import Engine
from data_pipeline.loaders.build import build_loader
from data_pipeline.sampling.order import BLOCK_SAMPLES, WINDOW_BLOCKS, epoch_order
from tests.support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:data.workers")


def make(path, views, workers=2, batch=4, **more):
    data = DataConfig(train=path, workers=workers, batches_ahead=2, **more)
    return build_loader(data, views, seed=0, rank=0, world_size=1, global_batch=batch)


def resident_kb() -> int:
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])


def state() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_nothing_grows_over_fifty_epochs(beton, small_views):
    loader = make(beton, small_views)
    for epoch in range(10):
        list(loader.epoch(epoch))
    resident, before = resident_kb(), state()
    for epoch in range(10, 50):
        list(loader.epoch(epoch))
    assert resident_kb() - resident < 4096
    assert state() == before
    loader.close()


def test_loaders_that_are_built_and_closed_leave_nothing(beton, small_views):
    def once():
        loader = make(beton, small_views)
        next(loader.epoch(0))
        loader.close()

    once()
    before, tasks = state(), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        once()
    assert state() == before
    # a thread that has been joined is listed until the kernel has taken it away
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= tasks


@pytest.mark.parametrize("workers", [1, 4])
def test_works_on_one_core_of_many(beton, small_views, workers):
    """As under SLURM: the process may use a subset of the cores, and the loader neither leaves nor widens it."""
    whole = os.sched_getaffinity(0)
    one = {min(whole)}
    expected = list(make(beton, small_views).epoch(0))
    os.sched_setaffinity(0, one)
    try:
        loader = make(beton, small_views, workers)
        found = list(loader.epoch(0))
        assert os.sched_getaffinity(0) == one
        for task in os.listdir("/proc/self/task"):
            assert os.sched_getaffinity(int(task)) <= whole
        loader.close()
    finally:
        os.sched_setaffinity(0, whole)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_an_error_of_the_disk_names_the_sample(own_beton, small_views, tmp_path):
    """A library put before libc fails every read that touches one sample, as a bad sector would."""
    source, library = tmp_path / "eio.c", tmp_path / "eio.so"
    info = open_beton(own_beton)
    bad = int(info.offsets[7])
    source.write_text(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <errno.h>\n#include <sys/types.h>\n#include <unistd.h>\n"
        "#define FAIL(name, type) ssize_t name(int f, void* b, size_t n, type at) {"
        f" if (at <= {bad} && {bad} < at + (type)n) {{ errno = {errno.EIO}; return -1; }}"
        " static ssize_t (*next)(int, void*, size_t, type);"
        ' if (!next) next = dlsym(RTLD_NEXT, "pread64"); return next(f, b, n, at); }\n'
        "FAIL(pread, off_t)\nFAIL(pread64, off64_t)\n"
    )
    if subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=False).returncode:
        pytest.skip("needs a C compiler")
    program = (
        "import sys; from pathlib import Path\n"
        "from data_pipeline.config import *; from data_pipeline.loaders.build import *\n"
        f"data = DataConfig(train=Path({str(own_beton)!r}), workers=1)\n"
        "loader = build_loader(data, ViewsConfig(), seed=0, rank=0, world_size=1, global_batch=4)\n"
        "try: list(loader.epoch(0))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    assert done.stdout.startswith("DataError")
    assert "sample 7 (" in done.stdout
    assert "the disk reported an error" in done.stdout


def test_tables_of_a_large_data_set_take_little(tmp_path):
    """FFCV's own bookkeeping took some 600 bytes per sample, in every rank."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.data_footprint import tiny_beton

    path = tiny_beton(tmp_path / "tiny.beton", 100_000)
    tiny = CropConfig(count=2, size_px=8, area_scale=(0.25, 1.0), blur_probability=(0.0,))
    views = ViewsConfig(global_crops=tiny, local_crops=tiny.model_copy(update={"count": 0}))
    make(path, views, batch=64).close()
    before = resident_kb()
    loader = make(path, views, batch=64)
    batch = next(loader.epoch(0))
    assert batch.views[0].shape == (2, 64, 3, 8, 8)
    assert (resident_kb() - before) * 1024 < 200 * 100_000
    loader.close()


def test_an_epoch_that_is_left_is_not_finished(beton, small_views, monkeypatch):
    loader = make(beton, small_views, batch=1)
    cut, calls = Engine.cut, []
    monkeypatch.setattr(Engine, "cut", lambda *given: calls.append(1) or cut(*given))
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    assert len(calls) <= 8  # what was under way, of 24
    loader.close()


@pytest.fixture
def huge_beton(tmp_path: Path) -> Path:
    """One picture of 36 million pixels among small ones."""
    folder = tmp_path / "huge"
    folder.mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    for i, side in enumerate((6000, 200, 300, 250)):
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=80)
    path = tmp_path / "huge.beton"
    convert([folder], path)
    return path


def test_scratch_of_a_huge_image_is_given_back(huge_beton):
    loader = make(huge_beton, ViewsConfig(), workers=1)
    list(loader.epoch(0))
    before = resident_kb()
    for epoch in range(1, 4):
        list(loader.epoch(epoch))
    assert resident_kb() - before < 32 * 1024
    loader.close()


def test_shrinking_while_decoding_cannot_be_seen(huge_beton):
    """Every crop of the huge picture is far larger than its view, so it is decoded at a part of its size."""
    plain = {"blur_probability": (0.0,)}
    views = ViewsConfig(
        global_crops=CropConfig(count=2, size_px=224, area_scale=(0.25, 1.0), **plain),
        local_crops=CropConfig(count=8, size_px=96, area_scale=(0.05, 0.25), **plain),
        jitter={"probability": 0.0},
        grey_probability=0.0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    data = [DataConfig(train=huge_beton, backend=backend, workers=1) for backend in ("ffcv", "torchvision")]
    loaders = [build_loader(d, views, seed=0, rank=0, world_size=1, global_batch=4) for d in data]
    for a, b in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        huge = a.sample_ids.tolist().index(0)
        for x, y in zip(a.views, b.views, strict=True):
            assert (x - y)[:, huge].abs().mean(dim=(-3, -2, -1)).max() * 255 < 1.0
    for loader in loaders:
        loader.close()


def test_how_random_the_order_by_blocks_is():
    """Figures for the manual: how far from a uniform order, and how much of the file is in use at a time."""
    size, classes = 1_281_167, 1000
    order = epoch_order(0, 0, size, "blocks")
    labels = order * classes // size
    batches = labels[: size // 1024 * 1024].reshape(-1, 1024)
    distinct = np.mean([len(np.unique(batch)) for batch in batches[::20]])
    uniform = classes * (1 - (1 - 1 / classes) ** 1024)
    assert 0.3 * uniform < distinct < uniform
    # a window is what has to be in the page cache: 16,384 samples, 1.3 % of ImageNet
    window = BLOCK_SAMPLES * WINDOW_BLOCKS
    blocks = [len(np.unique(part // BLOCK_SAMPLES)) for part in np.array_split(order, size // window)[::8]]
    assert max(blocks) <= 2 * WINDOW_BLOCKS + 2
    # two epochs have nothing to do with each other
    assert abs(np.corrcoef(order, epoch_order(0, 1, size, "blocks"))[0, 1]) < 0.01


def test_benchmark_refuses_to_compare_different_work():
    sys.path.insert(0, str(ROOT))
    from benchmarks.data import check_same

    views = (torch.rand(2, 3, 3, 8, 8), torch.rand(4, 3, 3, 4, 4))
    check_same("same", views, views, (1.0, 0.5))
    with pytest.raises(DataError, match="differ by"):
        check_same("other", views, (views[0].flip(-1), views[1]), (1.0, 0.5))
    with pytest.raises(DataError, match="shapes differ"):
        check_same("fewer", views, (views[0][:1], views[1]), (1.0, 0.5))


def test_ffcv_uses_no_cuda_in_its_thread(beton):
    """Where torch has GPUs, FFCV's thread would make streams on them: here, without one, that would raise."""
    program = (
        "from pathlib import Path; import torch; torch.cuda.is_available = lambda: True\n"
        "torch.cuda.Stream = torch.cuda.current_stream = None\n"
        "from data_pipeline.config import *; from data_pipeline.loaders.build import *\n"
        f"data = DataConfig(train=Path({str(beton)!r}), workers=1)\n"
        "loader = build_loader(data, ViewsConfig(), seed=0, rank=0, world_size=1, global_batch=8)\n"
        "print(len(list(loader.epoch(0))))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout.strip() == "3"
