"""The networks that an analysis looks at, and the images that it shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from data_pipeline.sampling.order import Int64Array
from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks
from mokd.evaluation.cache import CachedFeatures
from mokd.evaluation.data import LabelledSet
from mokd.evaluation.features import eval_loader, pooled
from mokd.evaluation.frozen import features_of
from mokd.evaluation.job import Job, perform
from mokd.evaluation.subjects import Subject
from mokd.evaluation.work import Work
from mokd.models.backbones import Backbone

ONE_PROCESS = Ranks()


@dataclass(frozen=True)
class Member:
    """One network, in evaluation mode on the device. alone: whether it is of a solo baseline."""

    branch: str
    alone: bool
    backbone: Backbone
    subject: Subject
    job: Job

    @property
    def label(self) -> str:
        """Its name in pictures and numbers."""
        return f"{self.branch} alone" if self.alone else self.branch


class Gathering:
    """Members, first those of the run and then their solo baselines, with what several parts of an analysis need.

    count: of images for pictures; samples: of images for statistics. Both are spread evenly over the test set.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device, count: int, samples: int) -> None:
        self.job, self.device, self._jobs = jobs[0], device, jobs
        self.members = [
            Member(subject.name, job is not jobs[0], subject.load().to(device).eval(), subject, job)
            for job in jobs
            for subject in job.wanted
        ]
        self.shown = _spread(self.test.size, count)
        self.sampled = _spread(self.test.size, samples)

    @property
    def config(self) -> RunConfig:
        """The configuration of the run, or the one made for a file of weights."""
        return self.job.config

    @property
    def test(self) -> LabelledSet:
        """The labelled images that everything is shown on."""
        return self.job.test

    @property
    def own(self) -> list[Member]:
        """The members that are no baselines."""
        return [member for member in self.members if not member.alone]

    def pairs(self) -> list[tuple[Member, Member]]:
        """All pairs of members that learned together, then those of baselines."""
        baselines = [member for member in self.members if member.alone]
        return [*combinations(self.own, 2), *combinations(baselines, 2)]

    def images(self, rows: Int64Array) -> Tensor:
        """Images `[B, 3, S, S]` of some rows of the test set, normalized, on the device."""
        return torch.cat(list(self.batches(rows)))

    def batches(self, rows: Int64Array) -> Iterator[Tensor]:
        """The same in batches of `evaluation.batch`."""
        part = replace(self.test, ids=self.test.ids[rows], labels=self.test.labels[rows])
        for batch in eval_loader(part, self.config, ONE_PROCESS, self.device):
            yield batch.images.to(self.device)

    @cached_property
    def pictures(self) -> Tensor:
        """The images of `shown`."""
        return self.images(self.shown)

    def drawable(self, images: Tensor) -> Tensor:
        """Normalized images `[B, C, S, S]` as colors `[B, S, S, 3]` in 0 to 1, on the CPU: of other than three
        channels the first one, in grey.
        """
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.config.views.mean, self.config.views.std))
        colors = (images.cpu() * std + mean).clamp(0.0, 1.0).permute(0, 2, 3, 1)
        return colors if colors.shape[-1] == 3 else colors[..., :1].expand(*colors.shape[:3], 3)

    def features(self, data: LabelledSet) -> list[CachedFeatures]:
        """The pooled features of a data set by every member, as `mokd eval` computes and keeps them."""
        found: list[CachedFeatures] = []
        for job in self._jobs:
            work = Work(job.wanted, job.train, job.test, job.config, ONE_PROCESS, self.device, job.directory)
            found += features_of(work, [("pooled", pooled)] * len(job.wanted), data)
        return found

    @cached_property
    def predictions(self) -> dict[str, Int64Array]:
        """k-NN predictions `[M]` for the test set by the label of every member, at the headline k of `mokd eval`."""
        found = {}
        for job in self._jobs:
            evaluation = perform(job, ONE_PROCESS, self.device)
            for member in (m for m in self.members if m.job is job):
                record = evaluation.record(member.branch)
                assert record is not None
                found[member.label] = evaluation.predictions[record["predictions"]]
        return found


def _spread(size: int, count: int) -> Int64Array:
    """`count` of `size` rows, evenly spread, or all."""
    return np.linspace(0, size - 1, min(size, count)).astype(np.int64)
