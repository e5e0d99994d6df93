"""What the first hour on a GPU should show, part by part; `make gpu-check` runs it. It needs no network and no FFCV.

usage: python -m benchmarks.gpu_check [--part NAME ...] [--device cuda|cpu] [--config FILE] [--again]

Figures go to benchmarks/results/gpu-<card>.json after every part; parts that are there already are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise
from benchmarks.step_plain import PlainStep
from mokd.config import RunConfig, load_config
from mokd.losses.kernels.targets import Target
from mokd.losses.prototype_loss import prototype_loss
from mokd.losses.prototypes import HeadOutput, Prototypes

BATCHES = (8, 64)
STEPS, WARMUP = 5, 3
PACKAGES, SOURCES = ("torch", "triton", "timm"), ("mokd", "data_pipeline", "benchmarks")


def kernels(config: RunConfig, device: torch.device) -> dict[str, float]:
    """Largest relative error of the fused loss and its gradients against float64 on the CPU, by type of products."""
    torch.manual_seed(0)
    views, batch, count = 4, 4, 2048
    rows = torch.nn.functional.normalize(torch.randn(views, batch, 64), dim=-1)
    head = Prototypes(64, count, train_gain=True)
    probabilities = [torch.randn(2, batch, count).mul(4).softmax(-1) for _ in range(2)]

    def results(where: torch.device, dtype: torch.dtype, half: torch.dtype | None) -> list[torch.Tensor]:
        own = Prototypes(64, count, train_gain=True).to(where, dtype)
        own.load_state_dict(head.state_dict())
        x = rows.to(where, dtype).requires_grad_()
        self_, cross = (p.to(where, dtype) for p in probabilities)
        targets = [Target(self_, 1.0), Target(cross, 0.3)]
        with torch.autocast(where.type, half, enabled=half is not None):
            total, terms = prototype_loss(HeadOutput(x, own()), targets, 0.1)
        gradients = torch.autograd.grad(total, [x, own.direction, own.gain])
        return [tensor.double().cpu() for tensor in (terms, *gradients)]

    expected = results(torch.device("cpu"), torch.float64, None)
    errors = {}
    for name, half in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        found = results(device, torch.float32, half)
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        limit = 1e-3 if half is None else 5e-2
        if not errors[name] < limit:
            raise RuntimeError(f"{name}: relative error {errors[name]:.3g}, expected below {limit:g}")
    return errors


def step(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Gradients of a step in which any wait for the GPU is an error; the one read of it, its agreement, is after."""
    pair = Pair(_batch(config, BATCHES[0]), device)
    training = OurStep(pair).step
    for number in range(WARMUP):  # kernels are compiled and constants brought to the device
        training.run(FIRST_STEP + number, pair.views, pair.epoch)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        _, agreement = training._gradients(FIRST_STEP + WARMUP, pair.views, pair.epoch)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    _, broken = agreement.answer()
    return {"broken_terms": broken, "waits": 0 if device.type == "cuda" else "not looked for on a CPU"}


def speed(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Images per second of our step and of the plain one, alternating."""
    found: dict[str, Any] = {}
    for images in BATCHES:
        own = _batch(config, images)
        pairs = {"ours": Pair(own, device), "plain": Pair(own, device)}
        contenders = {"ours": OurStep(pairs["ours"]), "plain": PlainStep(pairs["plain"])}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(WARMUP + STEPS):
            for name, contender in contenders.items():
                synchronise(device)
                began = time.perf_counter()
                contender(pairs[name].views, FIRST_STEP + number)
                synchronise(device)
                if number >= WARMUP:
                    seconds[name].append(time.perf_counter() - began)
        found[str(images)] = {name: images / statistics.median(times) for name, times in seconds.items()}
    return found


PARTS: dict[str, Callable[[RunConfig, torch.device], Any]] = {"kernels": kernels, "step": step, "speed": speed}


def _batch(config: RunConfig, images: int) -> RunConfig:
    return config.model_copy(update={"optim": config.optim.model_copy(update={"global_batch": images})})


def check(config: RunConfig, device: torch.device, record: Path, parts: list[str], *, again: bool = False) -> bool:
    """Runs parts that `record` has not got yet; True when all of them passed. A part that fails is run next time."""
    figures: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    passed = True
    for name in parts:
        if name in figures and not again:
            print(f"{name}: recorded already")
            continue
        try:
            figures[name] = PARTS[name](config, device)
        except Exception:
            traceback.print_exc()
            print(f"{name}: failed")
            passed = False
            continue
        print(f"{name}: {json.dumps(figures[name])}")
        figures["machine"] = describe(PACKAGES, SOURCES)
        unfinished = record.with_suffix(".tmp")
        unfinished.write_text(json.dumps(figures, indent=1) + "\n")
        unfinished.replace(record)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "vit_s_resnet50.yaml")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already once more")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --device cpu tests the logic alone")
        return 2
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    record = ROOT / "benchmarks" / "results" / f"gpu-{card.lower().replace(' ', '-')}.json"
    return 0 if check(load_config(options.config), device, record, options.part, again=options.again) else 1


if __name__ == "__main__":
    raise SystemExit(main())
