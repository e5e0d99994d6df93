"""The networks' passes replayed as CUDA graphs against the same passes as they are, under the rule of `switches`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.switches import Switch, measure_some

BATCHES = (8, 16, 64, 128)
SWITCH = {"execution.cuda_graphs=true": Switch(("execution.cuda_graphs=true",), gpus_only=True)}


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """As `switches`, at more batches: launches weigh more the fewer images there are."""
    batches = BATCHES if setting.on_gpu else setting.batches
    yield from measure_some(replace(setting, batches=batches), SWITCH)
