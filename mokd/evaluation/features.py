"""Frozen features of labelled images, sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import LabelledBatch
from mokd.backbones import Backbone


@torch.no_grad()
def extract(
    backbones: Sequence[Backbone], batches: Iterable[LabelledBatch], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """L2-normalised pooled features `[n, D]` in fp32 of every backbone, and labels `[n]`, of this rank's images.

    Every image is decoded once for all backbones. They run in evaluation mode and are left in the mode they were in.
    """
    modes = [backbone.training for backbone in backbones]
    features: list[list[Tensor]] = [[torch.zeros(0, 0)] for _ in backbones]
    labels = [torch.zeros(0, dtype=torch.int64)]
    try:
        for backbone in backbones:
            backbone.eval()
        for batch in batches:
            images = batch.images.to(device)
            for backbone, rows in zip(backbones, features, strict=True):
                rows.append(F.normalize(backbone(images).pooled.float(), dim=-1).cpu())
            labels.append(batch.labels.cpu())
    finally:
        for backbone, mode in zip(backbones, modes, strict=True):
            backbone.train(mode)
    return [torch.cat(rows[1:] or rows) for rows in features], torch.cat(labels)


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """The rows `[n_r, ...]` of all ranks, one rank's after another, on every rank; on the CPU."""
    if not dist.is_initialized():
        return rows
    sizes: list[tuple[int, tuple[int, ...]]] = [(0, ())] * dist.get_world_size()
    dist.all_gather_object(sizes, (rows.shape[0], tuple(rows.shape[1:])))
    longest = max(size for size, _ in sizes)
    tail = next(shape for size, shape in sizes if size == longest)  # a rank without rows does not know its width
    padded = torch.zeros(longest, *tail, dtype=rows.dtype, device=device)
    padded[: rows.shape[0]] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size].cpu() for part, (size, _) in zip(parts, sizes, strict=True)])
