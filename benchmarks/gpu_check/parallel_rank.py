"""One rank of the part `parallel`.

usage: python -m benchmarks.gpu_check.parallel_rank CONFIG.yaml RESULT.json WARMUP ROUNDS
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu_check.setting import give_back, with_batch
from benchmarks.step import TOLERANCE
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise
from mokd.config import RunConfig, load_config
from mokd.distributed.accelerators import pick_device
from mokd.distributed.local_ranks import leave_at_once
from mokd.distributed.process_group import Ranks, barrier, leave, ranks_from_environment
from mokd.models.sync_batchnorm import GpuSyncBatchNorm
from mokd.optim.precision import set_arithmetic

STEPS = 2  # whose losses are compared: before and after an update
Terms = list[dict[str, float]]


def main(given: str, found: str, warmup: str, rounds: str) -> None:
    """Measures, and leaves the figures in RESULT.json."""
    config = load_config(Path(given))
    ranks = ranks_from_environment()
    device = pick_device(ranks, config.parallel.device)
    torch.set_num_threads(config.parallel.threads_per_rank or torch.get_num_threads())
    set_arithmetic(config.precision)
    own = config.optim.global_batch // ranks.world_size
    views, expected, alone = _plain(config, device, own, ranks, int(warmup), int(rounds))
    give_back()
    _join(ranks, device)
    pair = Pair(config, device, ranks.world_size, ranks.rank)
    pair.views = [view[:, ranks.rank * own : (ranks.rank + 1) * own].to(device) for view in views]
    step = OurStep(pair)
    got = [_mean_over_ranks(step(pair.views, FIRST_STEP + number)) for number in range(STEPS)]
    seconds = _seconds(step, pair, int(warmup), int(rounds))
    batchnorm = _batchnorm_error(ranks, device)
    if ranks.is_main:
        exact = config.precision.compute == "fp32"
        rate = config.optim.global_batch / seconds
        result = {
            "backend": dist.get_backend(),
            "images_per_rank": own,
            "loss_error": max(_relative(a, b) for a, b in zip(got, expected, strict=True)),
            "loss_tolerance": TOLERANCE["fp32"] if device.type == "cpu" and exact else 2e-2,
            "batchnorm_error": batchnorm,
            "images_per_second": rate,
            "images_per_second_of_one_alone": own / alone,
            "efficiency": rate / (ranks.world_size * own / alone),
        }
        Path(found).write_text(json.dumps(result))
    barrier()
    leave()


def _plain(
    config: RunConfig, device: torch.device, own: int, ranks: Ranks, warmup: int, rounds: int
) -> tuple[list[Tensor], list[Terms], float]:
    """Views of the whole batch, and of one process without a group: its losses with them; seconds with a rank's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(g.count, config.optim.global_batch, 3, g.size_px, g.size_px) for g in config.views.groups]
    views = [torch.randn(shape, generator=generator) for shape in shapes]
    if not ranks.is_main:
        return views, [], 0.0
    pair = Pair(config, device)
    step = OurStep(pair)
    pair.views = [view.to(device) for view in views]
    losses = [_floats(step(pair.views, FIRST_STEP + number)) for number in range(STEPS)]
    pair = Pair(with_batch(config, own), device)
    return views, losses, _seconds(OurStep(pair), pair, warmup, rounds)


def _join(ranks: Ranks, device: torch.device) -> None:
    """As training joins, but also alone: the collectives of a single GPU's group are NCCL's too."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{ranks.master}:{ranks.port}",
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=device if device.type == "cuda" else None,
    )


def _seconds(step: OurStep, pair: Pair, warmup: int, rounds: int) -> float:
    """Median of a step."""
    times = []
    for number in range(warmup + rounds):
        barrier()
        synchronise(pair.device)
        began = time.perf_counter()
        step(pair.views, FIRST_STEP + STEPS + number)
        synchronise(pair.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[warmup:])


def _floats(losses: Sequence[dict[str, Tensor]]) -> Terms:
    return [{name: float(value) for name, value in loss.items()} for loss in losses]


def _mean_over_ranks(losses: Sequence[dict[str, Tensor]]) -> Terms:
    names = [(i, name) for i, loss in enumerate(losses) for name in loss]
    values = torch.stack([losses[i][name].detach().double() for i, name in names])
    dist.all_reduce(values)
    values /= dist.get_world_size()
    means: Terms = [{} for _ in losses]
    for (i, name), value in zip(names, values.tolist(), strict=True):
        means[i][name] = value
    return means


def _relative(found: Terms, expected: Terms) -> float:
    return max(
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-12) for a, b in zip(found, expected, strict=True) for name in b
    )


def _batchnorm_error(ranks: Ranks, device: torch.device) -> float:
    """Of outputs, gradients and running statistics of a rank's part, in both memory orders, against the whole."""
    worst = 0.0
    for order in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(1)
        whole, towards = (torch.randn(4 * ranks.world_size, 16, 6, 6, generator=generator) for _ in range(2))
        plain = nn.BatchNorm2d(16).to(device)
        synced = GpuSyncBatchNorm(copy.deepcopy(plain))
        mine = slice(4 * ranks.rank, 4 * (ranks.rank + 1))
        x, part = (t.to(device, memory_format=order, copy=True).requires_grad_() for t in (whole, whole[mine]))
        y = plain(x)
        y.backward(towards.to(device))
        z = synced._over_ranks(part)  # `forward` has no need of it in a group of one
        z.backward(towards[mine].to(device))
        assert x.grad is not None
        assert part.grad is not None
        pairs = [(z.detach(), y[mine].detach()), (part.grad, x.grad[mine])]
        pairs += [(getattr(synced, name), getattr(plain, name)) for name in ("running_mean", "running_var")]
        worst = max(worst, *(float((a - b).norm() / b.norm()) for a, b in pairs))
    return worst


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_at_once(0)
