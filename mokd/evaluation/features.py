"""Frozen features of labelled images, sharded over ranks.

Shape letters: B images of a batch, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.loaders.batch import LabelledBatch
from data_pipeline.loaders.build import build_eval_loader
from data_pipeline.loaders.evaluation import EvalLoader
from mokd.config import RunConfig
from mokd.config.evaluation import LinearConfig
from mokd.distributed.process_group import Ranks, gather_objects
from mokd.evaluation.data import LabelledSet
from mokd.models.backbones import Backbone

WIDE = 768  # ViT-B's width

Read = Callable[[Backbone, Tensor], Tensor]
# a way to read a network, with its name
Reading = tuple[str, Read]


def pooled(backbone: Backbone, images: Tensor) -> Tensor:
    """The pooled feature `[B, D]`."""
    return backbone(images).pooled


def class_tokens(backbone: Backbone, images: Tensor, *, blocks: int, patch_mean: bool) -> Tensor:
    """The normalised class tokens of the last `blocks` blocks, side by side, `[B, blocks * D]`; patch_mean: and the
    mean of the last block's patch tokens, `[B, (blocks + 1) * D]`.
    """
    parts = backbone.net.forward_intermediates(  # type: ignore[operator]
        images, indices=blocks, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    tokens = [prefix[:, 0] for _, prefix in parts]
    if patch_mean:
        tokens.append(parts[-1][0].mean(dim=1))
    return torch.cat(tokens, dim=-1)


def probe_reading(backbone: Backbone, section: LinearConfig) -> Reading:
    """How a linear probe reads a backbone, and that way's name: class tokens of a transformer, else what is pooled.

    The published probes read four blocks of ViT-S and one of ViT-B.
    """
    depth = len(getattr(backbone.net, "blocks", ()))
    if not (depth and getattr(backbone.net, "has_class_token", False)):
        return "pooled", pooled
    blocks = min(section.last_blocks or (1 if backbone.width >= WIDE else 4), depth)
    name = f"class tokens of {blocks}" + (" and the mean of patch tokens" if section.patch_mean else "")
    return name, partial(class_tokens, blocks=blocks, patch_mean=section.patch_mean)


def eval_loader(data: LabelledSet, config: RunConfig, ranks: Ranks, device: torch.device) -> EvalLoader:
    """This rank's part of a labelled data set, centre crops, in order."""
    section = config.evaluation
    return build_eval_loader(
        data.path,
        backend=data.backend,
        resize_px=section.resize_px,
        crop_px=section.crop_px,
        mean=config.views.mean,
        std=config.views.std,
        batch_size=section.batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.data.workers,
        device=device,
        ids=data.ids,
    )


@torch.no_grad()
def extract(
    backbones: Sequence[Backbone], reads: Sequence[Read], batches: Iterable[LabelledBatch], device: torch.device
) -> Iterator[list[Tensor]]:
    """Features `[B, D]` in fp32, on the device, of every backbone, for one batch after the other.

    Every image is decoded once for all backbones. They run in evaluation mode and are left in the mode they were in.
    """
    modes = [backbone.training for backbone in backbones]
    try:
        for backbone in backbones:
            backbone.eval()
        for batch in batches:
            images = batch.images.to(device)
            # compiled networks too: an odd batch or a new shape would be compiled again, on every rank
            with torch.compiler.set_stance("force_eager"):
                rows = [read(backbone, images).float() for backbone, read in zip(backbones, reads, strict=True)]
            yield rows
    finally:
        for backbone, mode in zip(backbones, modes, strict=True):
            backbone.train(mode)


def check_finite(bad_row: int | None, data: LabelledSet, device: torch.device) -> None:
    """UserError, on all ranks alike, when one of them has met a feature that is not finite at a row of the data set."""
    first = torch.tensor([data.size if bad_row is None else bad_row], device=device)
    if dist.is_initialized():
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    row = int(first)
    if row < data.size:
        sample = int(data.ids[row])
        raise UserError(f"{data.path}: the features of image {sample} are not finite; the network has diverged")


def first_bad(features: Tensor) -> int | None:
    """The first row that holds a NaN or an infinity."""
    bad = (~torch.isfinite(features).all(dim=1)).nonzero()
    return int(bad[0]) if bad.numel() else None


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """The rows `[n_r, ...]` of all ranks, one rank's after another, on every rank; on the CPU."""
    if not dist.is_initialized():
        return rows.cpu()
    sizes = gather_objects((rows.shape[0], tuple(rows.shape[1:])))
    longest = max(size for size, _ in sizes)
    tail = next(shape for size, shape in sizes if size == longest)  # a rank without rows does not know its width
    padded = torch.zeros(longest, *tail, dtype=rows.dtype, device=device)
    padded[: rows.shape[0]] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size].cpu() for part, (size, _) in zip(parts, sizes, strict=True)])
