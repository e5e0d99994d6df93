from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from mokd.config import RunConfig
from tests.support import tiny_config

CPU = torch.device("cpu")


def test_parts_run_and_are_recorded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BATCHES", (8,))
    record = tmp_path / "gpu.json"
    assert gpu_check.check(tiny_config(), CPU, record, list(gpu_check.PARTS))
    figures = json.loads(record.read_text())
    assert figures["kernels"]["fp32"] < 1e-4
    assert figures["step"]["broken_terms"] == []
    assert figures["speed"]["8"].keys() == {"ours", "plain"}

    def breaks(config: RunConfig, device: torch.device) -> None:
        raise RuntimeError("out of memory")

    # what is recorded is not measured again; what fails does not end what comes after it, nor leave figures
    monkeypatch.setattr(gpu_check, "PARTS", {"new": breaks, "speed": breaks, "last": lambda config, device: 1})
    assert not gpu_check.check(tiny_config(), CPU, record, ["new", "speed", "last"])
    assert json.loads(record.read_text()) | {"machine": None} == figures | {"last": 1, "machine": None}
