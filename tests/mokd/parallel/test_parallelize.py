from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from mokd.distributed.local_ranks import supervise


def test_a_static_graph_lives_through_freeze_and_thaw(tmp_path: Path) -> None:
    """The flags of DDP on GPUs, over gloo, against one process with the whole batch."""
    ends = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        assert supervise([sys.executable, "-m", "tests.programs.static_graph", str(output)], ranks) == 0
        ends.append(load_file(output))
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=1e-12, atol=1e-12)
