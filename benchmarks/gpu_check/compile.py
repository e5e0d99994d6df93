"""Compiling and CUDA graphs, on and off: the switches that take minutes, under the same rule as the others.

What does not end in its time goes on from what has been compiled, which is kept: `--patience 4` is enough for most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.switches import SWITCHES, measure_some


def measure(setting: Setting) -> Iterator[tuple[str, Any]]:
    """By switch: as `switches`."""
    yield from measure_some(setting, {name: switch for name, switch in SWITCHES.items() if switch.compiles})
