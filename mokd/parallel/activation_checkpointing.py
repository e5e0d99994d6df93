"""Activation checkpointing: a block keeps only its input and computes the rest again in the backward pass."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from data_pipeline.core.errors import UserError
from mokd.models.backbones import Backbone
from mokd.models.blocks import repeated_blocks


def recompute_blocks(backbone: Backbone, owner: str) -> None:
    """Makes every repeated block of a backbone recompute its activations; names in the state dict stay as they are.

    UserError where the network has no repeated blocks; `owner` is the branch, as the message names it.
    """
    blocks = repeated_blocks(backbone)
    if not blocks:
        raise UserError(f"{owner}.activation_checkpointing: this backbone has no repeated blocks; turn it off")
    backbone.drop_paths = []
    for block in blocks:
        # inside the module's own forward: hooks of FSDP, which gather the weights, stay outside
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Generator[None]:
    """BatchNorm moves its running statistics at every forward pass; the second pass of a step must not count."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
