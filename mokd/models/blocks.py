"""The repeated blocks of a network: the units in which it is sharded and recomputed."""

from __future__ import annotations

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The innermost composite members of `Sequential`s and `ModuleList`s, in order; empty where there are none.

    These are the residual blocks of a ResNet, ConvNeXt or Swin and the Transformer blocks of a ViT or T-Head.
    """
    found: dict[nn.Module, None] = {}
    for parent in module.modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            found.update(dict.fromkeys(child for child in parent.children() if _is_composite(child)))
    outer = {above for above in found for below in found if above is not below and below in set(above.modules())}
    return [block for block in found if block not in outer]


def _is_composite(module: nn.Module) -> bool:
    """Whether weights lie below the module, not only in it (a normalisation with its activation is no block)."""
    return any(next(child.parameters(), None) is not None for child in module.children())
