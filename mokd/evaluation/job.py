"""One call of `mokd eval`: what was asked for, checked; what of it is known already; the rest computed and written.

Every rank prepares the same job and performs it together with the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.checkpointing.hold import newest_held
from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks, broadcast_from_main
from mokd.evaluation import results, tasks
from mokd.evaluation.data import LabelledSet
from mokd.evaluation.request import Request
from mokd.evaluation.results import Evaluation
from mokd.evaluation.subjects import Subject, chosen, digest, from_file, from_run
from mokd.evaluation.work import Work
from mokd.runs.run_directory import RunDirectory


@dataclass(frozen=True)
class Job:
    """A request that can be carried out.

    fingerprints: of all branches, of everything their results follow from. protocol: of what a comparison must share,
    which is all of that but weights and seed.
    """

    request: Request
    config: RunConfig
    directory: Path
    subjects: list[Subject]
    wanted: list[Subject]
    train: LabelledSet
    test: LabelledSet
    protocol: str
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The result's JSON file."""
        first = self.subjects[0]
        name = self.request.name or self.request.task
        return results.result_path(self.directory, name, first.network, first.step)


@contextmanager
def holding(request: Request) -> Generator[Request]:
    """The request with the checkpoint that it is about, which no pruning takes away until the end of the context."""
    request.check()
    if request.source.is_file() or request.network == "scratch" or request.held is not None:
        yield request
        return
    with newest_held(RunDirectory.open(request.source)) as found:
        yield replace(request, held=found.path.absolute())


def configuration(request: Request) -> RunConfig:
    """The run's configuration, or one for a file of weights, with what the request changes about it. UserError."""
    request.check()
    from_weights = request.source.is_file()
    file = request.source if from_weights else RunDirectory.open(request.source).config_file
    raw = _config_for_weights(request) if from_weights else schema.read_yaml(file)
    raw = schema.apply_overrides(raw, request.overrides)
    tasks.place_data(raw, request.task, request.train, request.test)
    return schema.validate(RunConfig, raw, str(file))


def prepare(request: Request) -> Job:
    """All checks that need no network, of a request that is held. UserError for what cannot work."""
    from_weights = request.source.is_file()
    run = RunDirectory(request.source)
    config = configuration(request)
    train, test = tasks.open_data(config, request.task)
    subjects = (
        from_file(request.source, config) if from_weights else from_run(run, config, request.network, request.held)
    )
    directory = request.source.with_name(request.source.name + ".eval") if from_weights else run.evaluations
    settings = tasks.settings(config, request.task)
    fingerprints = {
        subject.name: digest(
            task=request.task,
            weights=subject.identity,
            settings=settings,
            data=[(data.fingerprint, data.limit, data.backend) for data in (train, test)],
        )
        for subject in subjects
    }
    protocol = digest(
        task=request.task,
        settings={key: value for key, value in settings.items() if key != "seed"},
        data=[(data.fingerprint, data.limit) for data in (train, test)],
    )
    wanted = chosen(subjects, request.branches)
    return Job(request, config, directory, subjects, wanted, train, test, protocol, fingerprints)


def _config_for_weights(request: Request) -> dict[str, Any]:
    """A configuration of one branch, for a file: of a run that never trains."""
    if request.backbone is None:
        raise UserError(f"{request.source}: is a file; say which network its weights are of with --backbone TIMM_NAME")
    branch = {
        "name": re.sub(r"[^A-Za-z0-9_-]", "_", request.backbone),
        "backbone": request.backbone,
        "stem": request.stem,
        "optimizer": {"kind": "sgd", "lr": 0.0},
    }
    return {"name": "weights", "data": {"train": str(request.train)}, "branches": [branch]}


def perform(job: Job, ranks: Ranks, device: torch.device) -> Evaluation:
    """The results of the job's branches; computed are those that are not known. All ranks call it and get the same."""
    order = [subject.name for subject in job.subjects]
    old = broadcast_from_main(results.find(job.path) if ranks.is_main else None)
    known = [name for name in order if old is not None and old.fingerprints.get(name) == job.fingerprints[name]]
    missing = {name: _missing_fractions(job, old if name in known else None, name) for name in order}
    todo = [s for s in job.wanted if job.request.again or s.name not in known or missing[s.name]]
    evaluation = old
    if todo:
        config = job.config
        if not job.request.again:
            config = _with_fractions(config, {f for subject in todo for f in missing[subject.name]})
        parts = tasks.run(job.request.task, Work(todo, job.train, job.test, config, ranks, device, job.directory))
        evaluation = _evaluation(job, todo, parts)
        if old is not None:
            done = [subject.name for subject in todo]
            if job.request.task == "semi":
                evaluation = results.joined(evaluation, old, [name for name in known if name in done])
            evaluation = results.merged(evaluation, old, [name for name in known if name not in done], order)
        if ranks.is_main:
            results.write(job.path, evaluation)
        for state in (state for part in parts for state in part.states):
            state.remove()
    assert evaluation is not None
    return evaluation


def _missing_fractions(job: Job, old: Evaluation | None, branch: str) -> list[float]:
    """Of few labels, the fractions that are not on record; the settings of other tasks are in their fingerprints."""
    asked = job.config.evaluation.semi.fractions if job.request.task == "semi" else ()
    return [fraction for fraction in asked if old is None or old.record(branch, fraction) is None]


def _with_fractions(config: RunConfig, fractions: Collection[float]) -> RunConfig:
    """With these of the fractions of few labels alone; as it is without any."""
    section = config.evaluation
    kept = tuple(fraction for fraction in section.semi.fractions if fraction in fractions)
    semi = section.semi.model_copy(update={"fractions": kept or section.semi.fractions})
    return config.model_copy(update={"evaluation": section.model_copy(update={"semi": semi})})


def _evaluation(job: Job, subjects: Sequence[Subject], parts: Sequence[tasks.Outcome]) -> Evaluation:
    labels, setting = job.test.labels, results.SETTINGS[job.request.task]
    records, predictions = [], {}
    for subject, outcome in zip(subjects, parts, strict=True):
        for i, answer in enumerate(outcome.answers):
            top1, top5 = results.accuracy(labels, answer.classes)
            key = f"{subject.name}/{setting}={answer.setting:g}"
            predictions[key] = answer.classes[:, 0].copy()
            records.append(
                {
                    "branch": subject.name,
                    "network": subject.network,
                    "task": job.request.task,
                    setting: answer.setting,
                    **answer.facts,
                    "top1": top1,
                    "top5": top5,
                    "step": subject.step,
                    "predictions": key,
                    "headline": i == outcome.headline(labels),
                }
            )
    first = subjects[0]
    return Evaluation(
        task=job.request.task,
        network=first.network,
        step=first.step,
        checkpoint=first.checkpoint,
        test=str(job.test.path),
        images=job.test.size,
        results=records,
        labels=labels,
        predictions=predictions,
        fingerprints={subject.name: job.fingerprints[subject.name] for subject in subjects},
        protocols={subject.name: job.protocol for subject in subjects},
    )


def records_of(job: Job, evaluation: Evaluation) -> Evaluation:
    """Only what was asked for: `--branch` leaves others' results in the file, but does not show them."""
    names = [subject.name for subject in job.wanted]
    return results.merged(
        Evaluation(**{**evaluation.__dict__, "results": [], "predictions": {}, "fingerprints": {}, "protocols": {}}),
        evaluation,
        names,
        names,
    )
