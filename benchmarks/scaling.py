"""How the step scales over ranks: measured where the machine has cores or GPUs for them, computed for others.

Weak scaling: every rank has as many images as one rank alone, and every rank as many threads. What is computed is
marked so: the bytes that a step sends, and what remains of the speed on links of given speeds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe
from benchmarks.step import PACKAGES, SOURCES, Effort, Say
from benchmarks.step_ours import Pair
from data_pipeline.core.errors import DataError
from data_pipeline.core.schema import dump_yaml
from mokd.config import RunConfig
from mokd.distributed.accelerators import pick_device
from mokd.distributed.local_ranks import supervise
from mokd.distributed.process_group import Ranks
from mokd.objectives.branch import Branch

WORLDS = (1, 2, 4)
LINKS_GB_PER_SECOND = {"10 GbE": 1.25, "100 GbE": 12.5, "4 x HDR InfiniBand": 100.0, "NVLink 4": 450.0}
COMPUTED_WORLDS = (8, 64)


def run(config: RunConfig, effort: Effort, say: Say) -> dict[str, Any]:
    """Measures 1, 2 and 4 ranks as far as there are places for them; computes the rest."""
    device = pick_device(Ranks(), config.parallel.device)
    places = torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads()
    worlds = [n for n in WORLDS if n <= places]
    threads = max(1, torch.get_num_threads() // worlds[-1])
    measured = {}
    for world in worlds:
        measured[world] = _measure(config, world, threads, effort)
        say(f"{world} ranks: {measured[world]['images_per_second']:.2f} images/s")
    alone = measured[1]
    sent = bytes_per_step(Pair(config, device).branches, config)
    return {
        "images_per_second": {str(n): m["images_per_second"] for n, m in measured.items()},
        "efficiency": {str(n): m["images_per_second"] / n / alone["images_per_second"] for n, m in measured.items()},
        "images_per_rank": config.optim.global_batch,
        "threads_per_rank": threads,
        "computed": {
            "note": "not measured: ring all-reduces at full link speed, behind the backward pass as far as it lasts",
            "bytes_per_step": sent,
            "efficiency": {
                link: {
                    str(n): predicted_efficiency(
                        sum(sent.values()), n, speed * 1e9, alone["seconds"], alone["backward_seconds"]
                    )
                    for n in COMPUTED_WORLDS
                }
                for link, speed in LINKS_GB_PER_SECOND.items()
            },
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": describe(PACKAGES, SOURCES),
    }


def bytes_per_step(branches: Sequence[Branch], config: RunConfig) -> dict[str, int]:
    """What a step reduces over ranks: gradients, BatchNorm statistics (both passes), centres; in fp32."""
    gradients = sum(p.numel() for b in branches for p in b.student.parameters() if p.requires_grad)
    groups = len(config.views.groups)
    norms = 0
    for branch in branches:
        # forward: sum, squares, count; backward: two sums. A teacher sees the global views only, and goes forward only
        norms += sum((2 * c + 1 + 2 * c) * groups for c in _channels(branch.student))
        norms += sum(2 * c + 1 for c in _channels(branch.teacher))
    centers = 2 * len(branches) * config.objective.prototypes
    return {"gradients": 4 * gradients, "batchnorm": 4 * norms, "centers": 4 * centers}


def predicted_efficiency(size: int, world: int, link: float, step_seconds: float, hidden_seconds: float) -> float:
    """Of a step that reduces `size` bytes in a ring of `world` ranks over links of `link` bytes/s, up to
    `hidden_seconds` of it behind computation."""
    travelling = 2 * (world - 1) / world * size / link
    return step_seconds / (step_seconds + max(0.0, travelling - hidden_seconds))


def _channels(network: nn.Module) -> list[int]:
    return [m.num_features for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _measure(config: RunConfig, world: int, threads: int, effort: Effort) -> dict[str, float]:
    optim = config.optim.model_copy(update={"global_batch": config.optim.global_batch * world})
    parallel = config.parallel.model_copy(update={"threads_per_rank": threads})
    with tempfile.TemporaryDirectory(prefix="mokd-bench-") as folder:
        given, found = Path(folder) / "config.yaml", Path(folder) / "found.json"
        given.write_text(dump_yaml(config.model_copy(update={"optim": optim, "parallel": parallel})))
        program = [sys.executable, "-m", "benchmarks.scaling_rank", str(given), str(found)]
        program += [str(effort.warmup), str(effort.rounds)]
        if supervise(program, world) or not found.is_file():
            raise DataError(f"benchmark: {world} ranks failed")
        return json.loads(found.read_text())
