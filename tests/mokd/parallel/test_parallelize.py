from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mokd.distributed.local_ranks import supervise


@pytest.mark.parametrize("way", ["ddp", "after"])
def test_gradients_are_averaged_through_freeze_and_thaw(way: str, tmp_path: Path) -> None:
    """With DDP's flags for GPUs, and after the passes, over gloo, against one process with the whole batch."""
    ends = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        assert supervise([sys.executable, "-m", "tests.programs.static_graph", way, str(output)], ranks) == 0
        ends.append(load_file(output))
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=1e-12, atol=1e-12)
