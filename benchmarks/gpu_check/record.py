"""The record of a card: every part's figures in one JSON file, replaced whole after every part."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe
from mokd.runs.files import replace_json

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES, SOURCES = ("torch", "triton", "timm", "numpy", "torchvision", "ffcv"), ("mokd", "data_pipeline", "benchmarks")


class Record:
    """`parts`: name -> figures. `measured`: name -> commit, date, seconds. `problems`: what did not end well, and why.

    A part with a problem counts as not recorded: it is measured again the next time.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.document: dict[str, Any] = {"parts": {}, "measured": {}, "problems": {}}
        if path.exists():
            self.document = json.loads(path.read_text())
        self.document["card"] = describe_card(device)

    @classmethod
    def of(cls, device: torch.device, folder: Path = RESULTS) -> Record:
        """The file of this machine's card."""
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return cls(folder / f"gpu-{card.lower().replace(' ', '-').replace('/', '-')}.json", device)

    def has(self, part: str) -> bool:
        """Whether a part was measured to its end."""
        return part in self.document["parts"] and part not in self.document["problems"]

    def add(self, part: str, figures: dict[str, Any], problem: str | None, seconds: float) -> None:
        """Writes what a part has found, if anything, and what kept it from its end."""
        if figures:
            self.document["parts"][part] = figures
        self.document["problems"].pop(part, None)
        if problem is not None:
            self.document["problems"][part] = problem
        machine = describe(PACKAGES, SOURCES)
        self.document["machine"] = machine
        self.document["measured"][part] = {
            "commit": machine["commit"],
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_json(self.path, self.document)


def describe_card(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver's and torch's CUDA."""
    if device.type != "cuda":
        return {"name": "cpu"}
    from mokd.distributed.accelerators import driver_cuda

    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_mb": properties.total_memory / 2**20,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cuda_of_the_driver": driver_cuda(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
    }
