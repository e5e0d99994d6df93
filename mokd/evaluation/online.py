"""Evaluation while training: the k-NN of every branch at once, a linear probe on the same features in the background.

What training waits for: a pass of the networks over the evaluation's images, shared by the ranks, the exchange of
features, and the k-NN; when a rank is asked to stop, all break it off within a batch. The probe's classifiers train in
a thread of the first rank, on the CPU. Nothing here draws from torch's random state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.sampling.order import subset
from mokd.config import RunConfig
from mokd.distributed.agreement import until_asked
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.evaluation import knn
from mokd.evaluation.cache import CachedFeatures
from mokd.evaluation.data import LabelledSet, check_neighbours, open_pair
from mokd.evaluation.features import check_finite, eval_loader, extract, first_bad, gather_rows, pooled
from mokd.evaluation.linear import FeatureSource, Heads, Standardised, train_epoch
from mokd.evaluation.results import accuracy
from mokd.models.backbones import Backbone

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
# the best rates of well-trained and of barely trained features lie two orders of magnitude apart
PROBE_RATES = (0.1, 1.0, 10.0)
PROBE_EPOCHS = 20
PROBE_BATCH = 256


@dataclass(frozen=True)
class Probed:
    """Top-1 accuracies in percent of linear probes, by branch, of the networks at `step`."""

    step: int
    top1: dict[str, float]


class OnlineEvaluation:
    """Evaluates teachers while they are in training; a probe that is under way is asked for with `probed`."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        stop: StopRequest,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """beat: told of every batch and block that is done."""
        self._config, self._ranks, self._device, self._stop, self._beat = config, ranks, device, stop, beat
        self._sets: tuple[LabelledSet, LabelledSet] | None = None
        self._thread: threading.Thread | None = None
        self._result: Probed | None = None

    def evaluate(self, backbones: Mapping[str, Backbone], step: int) -> dict[str, dict[int, float]]:
        """k-NN accuracies in percent by branch and k of `evaluation.knn.k`, on all ranks; begins a probe.

        BrokenOffError on all ranks, and nothing begun, when one is asked to stop meanwhile.
        """
        section, device = self._config.evaluation, self._device
        train, test = self._open()
        known, asked = (self._features(list(backbones.values()), data) for data in (train, test))
        first, last = train.part(self._ranks.rank, self._ranks.world_size)
        rows = torch.from_numpy(subset(train.size, section.probe_images))
        mine = rows[(rows >= first) & (rows < last)] - first
        labels, classes = torch.from_numpy(train.labels), len(train.classes)
        top1, for_probe = {}, {}
        for name, own, part in zip(backbones, known, asked, strict=True):
            everything = gather_rows(part, device)
            blocks = until_asked(
                knn.blocks_of(F.normalize(own, dim=1), first),
                _rounds(train, knn.BLOCK, self._ranks),
                self._stop,
                device,
            )
            queries = F.normalize(everything, dim=1).to(device)
            self._beat()
            found = knn.classify(blocks, labels, queries, section.knn.k, section.knn.temperature, classes)
            answers = zip(section.knn.k, found, strict=True)
            top1[name] = {k: accuracy(test.labels, answer.numpy())[0] for k, answer in answers}
            if section.probe_images:
                for_probe[name] = (gather_rows(own[mine], device), everything)
        if section.probe_images and self._ranks.is_main:
            arguments = (step, for_probe, labels[rows], test, classes)
            # daemon: a run that ends in an error does not wait for a number
            self._thread = threading.Thread(target=self._probe, args=arguments, name="linear probe", daemon=True)
            self._thread.start()
        return top1

    @property
    def probing(self) -> bool:
        """Whether a probe is under way whose result has not been asked for."""
        return self._thread is not None

    def probed(self, wait_seconds: float | None) -> Probed | None:
        """The probe under way, once, when it is done, after waiting for it so long at most (None: as long as it takes);
        None where there is none, or not yet.
        """
        if self._thread is None:
            return None
        self._thread.join(wait_seconds)
        if self._thread.is_alive():
            return None
        result, self._thread, self._result = self._result, None, None
        return result

    def _probe(
        self, step: int, features: dict[str, tuple[Tensor, Tensor]], labels: Tensor, test: LabelledSet, classes: int
    ) -> None:
        try:
            top1 = {
                name: _probe_top1(train, labels, asked, test, classes, self._config.seed)
                for name, (train, asked) in features.items()
            }
            self._result = Probed(step, top1)
        except Exception as error:  # a missing number is no reason to lose a run
            log.warning("step %d: the linear probe failed: %s", step, error)

    def _open(self) -> tuple[LabelledSet, LabelledSet]:
        if self._sets is None:
            section = self._config.evaluation
            self._sets = open_pair(section, self._config.data, for_monitor=True)
            check_neighbours(section.knn.k, self._sets[0])
        return self._sets

    def _features(self, backbones: list[Backbone], data: LabelledSet) -> list[Tensor]:
        """This rank's features by every backbone, on the CPU."""
        first, _ = data.part(self._ranks.rank, self._ranks.world_size)
        parts: list[list[Tensor]] = [[torch.zeros(0, 0)] for _ in backbones]
        loader = eval_loader(data, self._config, self._ranks, self._device)
        batches = extract(backbones, [pooled] * len(backbones), loader, self._device)
        rounds = _rounds(data, self._config.evaluation.batch, self._ranks)
        for batch in until_asked(batches, rounds, self._stop, self._device):
            self._beat()
            for own, rows in zip(parts, batch, strict=True):
                own.append(rows.cpu())
        features = [torch.cat(own[1:] or own) for own in parts]
        for rows in features:
            bad = first_bad(rows)
            check_finite(None if bad is None else first + bad, data, self._device)
        return features


def _rounds(data: LabelledSet, size: int, ranks: Ranks) -> int:
    """So many parts of `size` rows the rank with the most rows has."""
    parts = [data.part(rank, ranks.world_size) for rank in range(ranks.world_size)]
    return max(-(-(last - first) // size) for first, last in parts)


def _probe_top1(train: Tensor, labels: Tensor, asked: Tensor, test: LabelledSet, classes: int, seed: int) -> float:
    """The best of a few rates after a few epochs: a lower bound of what `mokd eval --task linear` finds."""
    features = CachedFeatures([train.numpy()])
    scale = Standardised(features)
    source = FeatureSource([features], [scale], labels, PROBE_BATCH, seed, CPU)
    heads = Heads(PROBE_RATES, features.width, classes, CPU)
    for epoch in range(PROBE_EPOCHS):
        train_epoch([heads], source, epoch, PROBE_EPOCHS)
    return max(accuracy(test.labels, answer.numpy())[0] for answer in heads.classify(scale(asked)))
