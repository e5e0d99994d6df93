"""DDP and FSDP2 on all GPUs that there are (one will do) against one process with the whole batch."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.setting import Setting
from data_pipeline.core.errors import DataError
from data_pipeline.core.schema import dump_yaml
from mokd.distributed.local_ranks import supervise

CPU_RANKS = 2
BATCHNORM_TOLERANCE = 1e-3
STRATEGIES = ("ddp", "fsdp")


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """By strategy: relative error of losses, images per second, efficiency; and the errors of SyncBN."""
    world = torch.cuda.device_count() if setting.on_gpu else CPU_RANKS
    yield "ranks", world
    for strategy in STRATEGIES:
        found = _run(setting, strategy, world)
        yield strategy, found
        if not found["loss_error"] < found["loss_tolerance"]:
            raise DataError(f"{strategy}: losses are {found['loss_error']:.2g} off those of one process")
        if not found["batchnorm_error"] < BATCHNORM_TOLERANCE:
            raise DataError(f"SyncBN: {found['batchnorm_error']:.2g} off one process with the whole batch")


def _run(setting: Setting, strategy: str, world: int) -> dict[str, Any]:
    config = setting.sized(setting.batches[0] * world)
    update = {"strategy": strategy, **({} if setting.on_gpu else {"threads_per_rank": 1})}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})
    with tempfile.TemporaryDirectory(prefix="mokd-gpu-check-") as folder:
        given, found = Path(folder) / "config.yaml", Path(folder) / "found.json"
        given.write_text(dump_yaml(config))
        program = [sys.executable, "-m", "benchmarks.gpu_check.parallel_rank", str(given), str(found)]
        program += [str(setting.effort.warmup), str(setting.effort.rounds)]
        status = supervise(program, world)
        if status or not found.is_file():
            raise DataError(f"{strategy}: a rank left with status {status}; its words are above")
        return json.loads(found.read_text())
