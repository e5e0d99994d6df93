"""torchvision's names of a vision transformer and of a ConvNeXt, where timm has others for the same tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

# Pairs of what a key begins with, torchvision's and timm's; # is the number of a block.
_TRANSFORMER = (
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_#.ln_1.", "blocks.#.norm1."),
    ("encoder.layers.encoder_layer_#.self_attention.in_proj_", "blocks.#.attn.qkv."),
    ("encoder.layers.encoder_layer_#.self_attention.out_proj.", "blocks.#.attn.proj."),
    ("encoder.layers.encoder_layer_#.ln_2.", "blocks.#.norm2."),
    ("encoder.layers.encoder_layer_#.mlp.0.", "blocks.#.mlp.fc1."),
    ("encoder.layers.encoder_layer_#.mlp.3.", "blocks.#.mlp.fc2."),
    # the published files are older than the names 0 and 3
    ("encoder.layers.encoder_layer_#.mlp.linear_1.", "blocks.#.mlp.fc1."),
    ("encoder.layers.encoder_layer_#.mlp.linear_2.", "blocks.#.mlp.fc2."),
    ("encoder.ln.", "norm."),
)
_CONVNEXT = (
    ("features.0.", "stem."),
    *((f"features.{2 * stage}.", f"stages.{stage}.downsample.") for stage in (1, 2, 3)),
    *(
        (f"features.{2 * stage + 1}.#.{theirs}", f"stages.{stage}.blocks.#.{ours}")
        for stage in (0, 1, 2, 3)
        for theirs, ours in (
            ("block.0.", "conv_dw."),
            ("block.2.", "norm."),
            ("block.3.", "mlp.fc1."),
            ("block.5.", "mlp.fc2."),
            ("layer_scale", "gamma"),
        )
    ),
    ("classifier.0.", "head.norm."),
    ("classifier.2.", "head.fc."),
)


def _renaming(pairs: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    """From the first name of every pair to the second; of two pairs with one first name the earlier holds."""
    rules = [(re.compile(re.escape(a).replace(r"\#", r"(\d+)")), b.replace("#", r"\1")) for a, b in pairs]

    def renamed(key: str) -> str:
        for pattern, name in rules:
            if found := pattern.match(key):
                return found.expand(name) + key[found.end() :]
        return key

    return renamed


def _turned(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((b, a) for a, b in pairs)


# a key that only this family has: torchvision's, timm's, and the names both ways
_FAMILIES = (
    ("encoder.pos_embedding", "cls_token", _renaming(_TRANSFORMER), _renaming(_turned(_TRANSFORMER))),
    ("features.0.0.weight", "stages.0.blocks.0.conv_dw.weight", _renaming(_CONVNEXT), _renaming(_turned(_CONVNEXT))),
)


def to_timm(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's tensors as timm's network with the state dict `own` has them; others as they are."""
    for theirs, ours, renamed, _ in _FAMILIES:
        if theirs in tensors and ours in own:
            return _shaped({renamed(key): value for key, value in tensors.items()}, own)
    return dict(tensors)


def to_torchvision(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors as torchvision's network with the state dict `own` has them; others as they are."""
    for theirs, ours, _, renamed in _FAMILIES:
        if ours in tensors and theirs in own:
            return _shaped({renamed(key): value for key, value in tensors.items()}, own)
    return dict(tensors)


def _shaped(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the shapes of `own` where only axes of length 1 differ: a 1x1 convolution for a linear layer."""

    def shaped(key: str, value: Tensor) -> Tensor:
        wanted = own[key].shape if key in own else value.shape
        same = [n for n in value.shape if n != 1] == [n for n in wanted if n != 1]
        return value.reshape(wanted) if same else value

    return {key: shaped(key, value) for key, value in tensors.items()}
