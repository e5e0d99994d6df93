"""The k-NN of every branch, while training and for a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import build_eval_loader
from mokd.backbones import Backbone
from mokd.config import RunConfig
from mokd.distributed import Ranks
from mokd.evaluation import knn
from mokd.evaluation.features import extract


def knn_of(
    backbones: Sequence[Backbone], config: RunConfig, ranks: Ranks, device: torch.device
) -> list[list[knn.KnnAccuracy]]:
    """k-NN accuracies of several backbones on the data that `config.evaluation` names, the same on every rank."""
    section = config.evaluation
    assert section.train is not None
    assert section.test is not None
    train, train_labels = _features(backbones, section.train, section.train_limit, config, ranks, device)
    test, test_labels = _features(backbones, section.test, section.test_limit, config, ranks, device)
    return [
        knn.evaluate((a, train_labels), (b, test_labels), section.knn.k, section.knn.temperature, device)
        for a, b in zip(train, test, strict=True)
    ]


def _features(
    backbones: Sequence[Backbone],
    path: Path,
    limit: int | None,
    config: RunConfig,
    ranks: Ranks,
    device: torch.device,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    section = config.evaluation
    loader = build_eval_loader(
        path,
        backend=config.data.backend,
        resize_px=section.resize_px,
        crop_px=section.crop_px,
        mean=config.views.mean,
        std=config.views.std,
        batch_size=section.batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.data.workers,
        device=device,
        limit=limit,
    )
    features, labels = extract(backbones, loader, device)
    for rows in features:
        if labels.numel():
            knn.check_labelled(rows, labels, str(path))
    return features, labels


def records(branch: str, network: str, step: int, results: Sequence[knn.KnnAccuracy]) -> Iterator[dict[str, Any]]:
    """The records that `mokd eval --json` prints."""
    for r in results:
        yield {
            "branch": branch,
            "network": network,
            "task": "knn",
            "k": r.k,
            "top1": round(r.top1, 3),
            "top5": round(r.top5, 3),
            "step": step,
        }
