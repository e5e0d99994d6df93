"""`torch.compile` of networks, applied from outside."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mokd.objectives.branch import NetworkPair


def compile_networks(pair: NetworkPair, *, cuda_graphs: bool = False) -> None:
    """Compiles backbone and heads of student and teacher, in place, for the shapes they meet.

    cuda_graphs: each is recorded and replayed as a whole; every step then begins with `begin_step`.

    Names of parameters stay as they are. What was compiled is kept in the user's cache directory, so a restart finds
    it there. Stochastic depth draws the numbers that it draws in eager mode.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mokd" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._inductor.config.fallback_random = True
    for network in (pair.student, pair.teacher):
        for part in network.children():
            part.compile(dynamic=False, mode="reduce-overhead" if cuda_graphs else None)


def begin_step(*, cuda_graphs: bool) -> None:
    """Outputs of the step before are not needed any more: replayed graphs may overwrite them."""
    if cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()
