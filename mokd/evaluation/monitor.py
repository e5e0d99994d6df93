"""The k-NN of every branch while training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mokd.backbones import Backbone
from mokd.config import RunConfig
from mokd.distributed import Ranks
from mokd.evaluation import knn
from mokd.evaluation.data import LabelledSet, check_neighbours, open_pair
from mokd.evaluation.features import check_finite, eval_loader, extract, first_bad, gather_rows, pooled
from mokd.evaluation.results import accuracy


def knn_top1(backbones: Sequence[Backbone], config: RunConfig, ranks: Ranks, device: torch.device) -> list[float]:
    """The best k-NN accuracy in percent of every backbone over `evaluation.knn.k`; all ranks call it and know it."""
    section = config.evaluation
    train, test = open_pair(section, config.data.backend)
    check_neighbours(section.knn.k, train)
    known = _features(backbones, train, config, ranks, device)
    asked = _features(backbones, test, config, ranks, device)
    labels, classes = torch.from_numpy(train.labels), len(train.classes)
    first, _ = train.part(ranks.rank, ranks.world_size)
    best = []
    for own, queries in zip(known, asked, strict=True):
        everything = gather_rows(queries, device).to(device)
        found = knn.classify(
            knn.blocks_of(own, first), labels, everything, section.knn.k, section.knn.temperature, classes
        )
        best.append(max(accuracy(test.labels, answer.numpy())[0] for answer in found))
    return best


def _features(
    backbones: Sequence[Backbone], data: LabelledSet, config: RunConfig, ranks: Ranks, device: torch.device
) -> list[torch.Tensor]:
    """This rank's L2-normalised features by every backbone."""
    first, _ = data.part(ranks.rank, ranks.world_size)
    parts: list[list[torch.Tensor]] = [[torch.zeros(0, 0)] for _ in backbones]
    loader = eval_loader(data, config, ranks, device)
    for batch in extract(backbones, [pooled] * len(backbones), loader, device):
        for own, rows in zip(parts, batch, strict=True):
            own.append(rows.cpu())
    features = [torch.cat(own[1:] or own) for own in parts]
    for rows in features:
        bad = first_bad(rows)
        check_finite(None if bad is None else first + bad, data, device)
    return [F.normalize(rows, dim=1) for rows in features]
