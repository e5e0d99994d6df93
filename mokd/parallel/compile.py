"""`torch.compile` of networks, applied from outside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mokd.models.trainable import TrainableNetwork

# Blocks share the code of their class, which is compiled once for every shape and stride of them: a ResNet-50 has 16
# blocks and meets two sizes of crops
_VARIANTS = 256


def compile_networks(networks: Sequence[TrainableNetwork], *, by_block: bool = False) -> None:
    """Compiles backbones and heads of networks, in place, for the shapes they meet.

    by_block: the units of sharding one by one; hooks of FSDP lie between them, which a whole network's graph breaks at.

    Names of parameters stay as they are. What was compiled is kept in the user's cache directory, so a restart finds
    it there. Stochastic depth draws the numbers that it draws in eager mode.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mokd" / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    torch._inductor.config.fallback_random = True
    torch._dynamo.config.recompile_limit = _VARIANTS
    for network in networks:
        for part in network.units().half if by_block else network.children():
            part.compile(dynamic=False)
