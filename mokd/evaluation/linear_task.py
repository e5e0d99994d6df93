"""The linear probe of `mokd eval`: on standardised features that are known, or with augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor

from mokd.evaluation.answers import Answer, Outcome
from mokd.evaluation.augmented import AugmentedSource, batch_of, labelled_loader
from mokd.evaluation.features import Reading, gather_rows, probe_reading
from mokd.evaluation.frozen import features_of
from mokd.evaluation.kept_state import KeptState
from mokd.evaluation.linear import BASE_BATCH, BLOCK, FeatureSource, Heads, Source, Standardised, train_epoch
from mokd.evaluation.subjects import digest
from mokd.evaluation.work import Work
from mokd.runs.progress import WorkProgress
from mokd.runs.seeds import derive_seed


def linear_task(work: Work) -> list[Outcome]:
    """All rates of `evaluation.linear`, trained at once; ranks share them out. The most accurate is the headline."""
    config, ranks, device = work.config, work.ranks, work.device
    section, train, test = config.evaluation.linear, work.train, work.test
    backbones = [subject.load() for subject in work.subjects]
    readings = [probe_reading(backbone, section) for backbone in backbones]
    asked = features_of(work, readings, test)
    scales: list[Standardised] = []
    with ExitStack() as stack:
        source: Source
        if section.augment:
            batch = batch_of(section.batch, train.size, ranks)
            loader = stack.enter_context(closing(labelled_loader(train, train.ids, batch, config, ranks, device)))
            backbones = [backbone.to(device) for backbone in backbones]
            source = AugmentedSource(backbones, [read for _, read in readings], loader, device)
        else:
            batch = min(section.batch, train.size)
            scales = [Standardised(part) for part in features_of(work, readings, train)]
            source = FeatureSource(scales, torch.from_numpy(train.labels), batch, config.seed, device)
        mine = range(ranks.rank, len(section.rates), ranks.world_size)
        rates = [section.rates[i] * batch / BASE_BATCH for i in mine]
        first = derive_seed(config.seed, "linear probe") if section.augment else None
        heads = [Heads(rates, part.width, len(train.classes), device, first) for part in asked]
        state = KeptState(_state_path(work, readings), is_main=ranks.is_main)
        _train(heads, source, state, work)
    outcomes = []
    for i, own in enumerate(heads):
        parts = [scales[i](block) if scales else block for _, block in asked[i].blocks(0, test.size, BLOCK)]
        classes = _whole(own.classify(torch.cat(parts).to(device)), work)
        facts = {"augment": section.augment, "features": readings[i][0]}
        answers = [Answer(lr, part.numpy(), facts) for lr, part in zip(section.rates, classes, strict=True)]
        outcomes.append(Outcome(answers, states=[state]))
    return outcomes


def _train(heads: Sequence[Heads], source: Source, state: KeptState, work: Work) -> None:
    epochs, ranks = work.config.evaluation.linear.epochs, work.ranks
    done, tensors = state.load()
    if done:
        for i, own in enumerate(heads):
            saved = {name: tensors[f"{i}.{name}"][ranks.rank :: ranks.world_size] for name in own.state_tensors()}
            own.load_state_tensors(saved)
    with WorkProgress("linear probe, epoch", done=done, per_second=False, shown=ranks.is_main) as progress:
        for epoch in range(done, epochs):
            train_epoch(heads, source, epoch, epochs)
            everything = {
                f"{i}.{name}": _whole(value, work)
                for i, own in enumerate(heads)
                for name, value in own.state_tensors().items()
            }
            state.save(epoch + 1, everything)
            progress.update(epoch + 1, epochs)


def _whole(own: Tensor, work: Work) -> Tensor:
    """Rows of all ranks, to which they were dealt in turn, back in their order."""
    rows, world = gather_rows(own, work.device), work.ranks.world_size
    dealt = [i for rank in range(world) for i in range(rank, len(rows), world)]
    return rows[torch.tensor(dealt).argsort()]


def _state_path(work: Work, readings: Sequence[Reading]) -> Path:
    config, train = work.config, work.train
    section = config.evaluation
    identity = digest(
        subjects=[subject.identity for subject in work.subjects],
        readings=[name for name, _ in readings],
        data=[train.fingerprint, train.limit, train.backend],
        section=section.linear.model_dump(mode="json"),
        images=[section.resize_px, section.crop_px, section.area_scale, config.views.mean, config.views.std],
        seed=config.seed,
    )
    return work.directory / "state" / f"{identity}.safetensors"
