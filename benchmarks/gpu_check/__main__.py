"""What the first hour on a GPU should show, part by part; `make gpu-check` runs it. It needs no network and no FFCV.

usage: python -m benchmarks.gpu_check [--part NAME ...] [--device cuda|cpu] [--config FILE] [--again] [--patience N]

Figures go to benchmarks/results/gpu-<card>.json after every part; parts that are there already are left out. All of
them take at most ten minutes. Exit status 1: a part found something wrong, or did not end in its time; 2: no GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gpu_check.record import RESULTS, Record
from benchmarks.gpu_check.run import SECONDS, check
from benchmarks.machine import ROOT
from data_pipeline.core.errors import UserError
from mokd.config import load_config
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import Ranks

CONFIGS = {"cuda": ROOT / "configs" / "vit_s_resnet50.yaml", "cpu": ROOT / "benchmarks" / "step.yaml"}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tests the logic, on little")
    parser.add_argument("--config", type=Path, help="default: the headline's; on a CPU a small pair")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already once more")
    parser.add_argument("--patience", type=float, default=1.0, help="times the seconds that a part may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record and the traces")
    options = parser.parse_args(arguments)
    try:
        device = pick_device(Ranks(), options.device)
        config = load_config(options.config or CONFIGS[device.type])
    except UserError as error:
        print(f"error: {error}")
        return 2
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        print("note: this card computes bf16 slowly or not at all; give a --config with precision.compute: fp16")
    record = Record.of(device, options.results)
    passed = check(config, record, device.type, options.part, patience=options.patience, again=options.again)
    print(f"recorded in {record.path}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
