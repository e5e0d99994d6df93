"""What passes through a network while it runs: the output of every block, and the weights of every attention.

Shape letters: B images, H x W grid of a map, C channels, h heads, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.models.backbones import Backbone
from mokd.models.blocks import repeated_blocks


def blocks_by_name(backbone: Backbone) -> dict[str, nn.Module]:
    """The residual or transformer blocks of a backbone, in order, by their names in timm's network."""
    names = {module: name for name, module in backbone.net.named_modules()}
    return {names[block]: block for block in repeated_blocks(backbone.net)}


@contextmanager
def captured_maps(backbone: Backbone) -> Generator[dict[str, Tensor]]:
    """Within, a pass of the backbone leaves the output of every block as a map `[B, H, W, C]` in the dictionary.

    Class and register tokens are left out, and so is a block whose output is no square map. UserError where a network
    has no blocks.
    """
    maps: dict[str, Tensor] = {}
    blocks = blocks_by_name(backbone)
    if not blocks:
        raise UserError("a network without repeated blocks has no layers to look at")

    def keep(name: str, _module: nn.Module, _given: Any, output: Any) -> None:
        found = _as_map(backbone, output[0] if isinstance(output, tuple | list) else output)
        if found is not None:
            maps[name] = found

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(block.register_forward_hook(partial(keep, name)))
        yield maps


def _as_map(backbone: Backbone, output: Tensor) -> Tensor | None:
    if output.ndim == 4:
        return output if getattr(backbone.net, "output_fmt", "NCHW") == "NHWC" else output.permute(0, 2, 3, 1)
    if output.ndim != 3:
        return None
    tokens = output[:, backbone.prefix_tokens :]
    side = square_side(tokens.shape[1])
    return tokens.unflatten(1, (side, side)) if side else None


@contextmanager
def attention_read(module: nn.Module, read: Callable[[str, Tensor], None]) -> Generator[None]:
    """Within, `read` gets the name and the weights `[B, h, N, N]` (rows sum to 1) of every attention that runs.

    They are computed openly instead of by a fused kernel, in the order of the network, and are not kept.
    """

    def pass_on(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        read(name, given[0])

    with ExitStack() as stack:
        for name, part in module.named_modules():
            # timm's attentions: their weights pass through `attn_drop` unless fused
            dropout = getattr(part, "attn_drop", None)
            if hasattr(part, "fused_attn") and isinstance(dropout, nn.Module):
                stack.callback(setattr, part, "fused_attn", part.fused_attn)
                part.fused_attn = False
                stack.enter_context(dropout.register_forward_pre_hook(partial(pass_on, name)))
        yield


def square_side(tokens: int) -> int | None:
    """The side of a square grid of so many tokens; None where they form none."""
    side = math.isqrt(tokens)
    return side if side and side**2 == tokens else None
