"""Tasks on frozen features: one pass over the images for all networks, kept on disk; and the k-NN on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mokd.config import RunConfig
from mokd.distributed.process_group import broadcast_from_main
from mokd.evaluation import knn
from mokd.evaluation.answers import Answer, Outcome
from mokd.evaluation.cache import CachedFeatures, CacheWriter, is_whole, open_features, prune
from mokd.evaluation.data import LabelledSet
from mokd.evaluation.features import Reading, check_finite, eval_loader, extract, pooled
from mokd.evaluation.subjects import Subject, digest
from mokd.evaluation.work import Work


def features_of(work: Work, readings: Sequence[Reading], data: LabelledSet) -> list[CachedFeatures]:
    """Features of a data set by several networks, from the cache or computed in one pass over the images."""
    subjects, config, ranks, device = work.subjects, work.config, work.ranks, work.device
    folder = work.directory / "features"
    what = [_what(subject, name, data, config) for subject, (name, _) in zip(subjects, readings, strict=True)]
    # what takes the place of features of the same name when a setting, or the data, has changed
    slots = [
        digest(name=subject.name, network=subject.network, reading=name, data=data.path, limit=data.limit)
        for subject, (name, _) in zip(subjects, readings, strict=True)
    ]
    places = [folder / digest(**entry) for entry in what]
    whole = broadcast_from_main([is_whole(place) for place in places] if ranks.is_main else [])
    missing = [i for i, found in enumerate(whole) if not found]
    if missing:
        if ranks.is_main:
            prune(folder, subjects[0].step, [slots[i] for i in missing])
        writers = [CacheWriter(places[i], data.part(ranks.rank, ranks.world_size)[0], ranks) for i in missing]
        backbones = [subjects[i].load().to(device) for i in missing]
        reads = [readings[i][1] for i in missing]
        try:
            for batch in extract(backbones, reads, eval_loader(data, config, ranks, device), device):
                for writer, rows in zip(writers, batch, strict=True):
                    writer.add(rows)
            for writer in writers:
                check_finite(writer.bad_row, data, device)
        except BaseException:
            for writer in writers:
                writer.discard()
            raise
        for i, writer in zip(missing, writers, strict=True):
            writer.publish({"step": subjects[i].step, "slot": slots[i], **what[i]})
    return [open_features(place) for place in places]


def _what(subject: Subject, reading: str, data: LabelledSet, config: RunConfig) -> dict[str, object]:
    section = config.evaluation
    return {
        "subject": subject.identity,
        "reading": reading,
        "data": [data.fingerprint, data.limit, data.backend],
        "image": [section.resize_px, section.crop_px, config.views.mean, config.views.std],
    }


def knn_task(work: Work) -> list[Outcome]:
    """k-NN with every k of `evaluation.knn`."""
    section, train, test = work.config.evaluation.knn, work.train, work.test
    readings = [("pooled", pooled)] * len(work.subjects)
    sets = [features_of(work, readings, data) for data in (train, test)]
    low, high = train.part(work.ranks.rank, work.ranks.world_size)
    labels = torch.from_numpy(train.labels)
    outcomes = []
    for known, asked in zip(*sets, strict=True):
        blocks = ((row, F.normalize(block, dim=1)) for row, block in known.blocks(low, high, knn.BLOCK))
        queries = F.normalize(torch.cat([block for _, block in asked.blocks(0, test.size, knn.BLOCK)]), dim=1)
        classes = len(train.classes)
        found = knn.classify(blocks, labels, queries.to(work.device), section.k, section.temperature, classes)
        answers = [Answer(k, answer.numpy()) for k, answer in zip(section.k, found, strict=True)]
        outcomes.append(Outcome(answers, section.k.index(section.headline)))
    return outcomes
