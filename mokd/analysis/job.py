"""One call of `mokd analyze`: what was asked for, checked; its parts found one by one and written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from mokd.analysis import distances, embedding, maps, predictions, similarity
from mokd.analysis.finding import Part, one_branch
from mokd.analysis.members import ONE_PROCESS, Gathering
from mokd.checkpointing.hold import newest_held
from mokd.distributed.accelerators import pick_device
from mokd.evaluation.job import Job, prepare
from mokd.evaluation.request import Request
from mokd.optim.precision import set_arithmetic
from mokd.runs.run_directory import RunDirectory

PARTS = {
    "distance": Part(distances.find),
    "cka": Part(similarity.find_cka, one_branch),
    "rank": Part(similarity.find_rank),
    "agreement": Part(predictions.find_agreement, one_branch),
    "tsne": Part(embedding.find, embedding.lacking),
    "attention": Part(maps.find_attention, maps.lacks_attention),
    "search": Part(maps.find_search, maps.lacks_search),
    "pca": Part(maps.find_pca),
    "neighbors": Part(predictions.find_neighbors),
}
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class AnalysisRequest:
    """The arguments of `mokd analyze`.

    evaluation: which networks and data, as for `mokd eval --task knn`. what: names of parts; all that can be done
    without any. step: of the checkpoint; the newest without. solos: runs of single branches, at their newest
    checkpoints. images, samples: of the test set, for pictures and for statistics. name: of the folder.
    """

    evaluation: Request
    what: tuple[str, ...] = ()
    step: int | None = None
    solos: tuple[Path, ...] = ()
    images: int = 6
    samples: int = 512
    name: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Written:
    """Files of one finding, or the reason why a part was left out."""

    part: str
    alt: str = ""
    files: Sequence[Path] = ()
    left_out: str | None = None


def analyze(request: AnalysisRequest) -> Iterator[Written]:
    """Finds and writes the parts, one after another. UserError for what cannot work, most of it before any work."""
    _check(request)
    device = pick_device(ONE_PROCESS, request.device)
    with ExitStack() as stack:
        main = _prepared(request.evaluation, request.step, stack)
        jobs = [main, *(_baseline(request, main, solo, stack) for solo in request.solos)]
        names = [job.wanted[0].name for job in jobs[1:]]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"--solo: two runs of branch '{twice.pop()}'; give one")
        set_arithmetic(main.config.precision)
        gathering = Gathering(jobs, device, request.images, request.samples)
        lacking = {name: PARTS[name].lacks(gathering) for name in request.what or PARTS}
        for name, lack in lacking.items():
            if lack is not None and name in request.what:
                raise UserError(f"--what {name}: {lack}")
        first = main.subjects[0]
        folder = _folder(main) / (request.name or first.network + (f"-step-{first.step}" if first.step else ""))
        about = _about(jobs)
        for name, lack in lacking.items():
            if lack is not None:
                yield Written(name, left_out=lack)
                continue
            for finding in PARTS[name].find(gathering):
                yield Written(name, finding.alt, finding.write(folder, {"part": name, **about}))


def _check(request: AnalysisRequest) -> None:
    for name in request.what:
        if name not in PARTS:
            raise UserError(f"--what: given '{name}', expected some of {','.join(PARTS)}")
    if request.device not in DEVICES:
        raise UserError(f"--device: given '{request.device}', expected {' or '.join(DEVICES)}")
    if (folder := request.name) is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder):
        raise UserError(f"--name: given {folder!r}, expected letters, digits, '.', '_' and '-' (it names a folder)")


def _prepared(request: Request, step: int | None, stack: ExitStack) -> Job:
    """A job whose checkpoint is held until the stack is left."""
    if request.source.is_file() or request.network == "scratch":
        if step is not None:
            raise UserError(f"--step {step}: only a run's trained networks have steps")
        return prepare(request)
    found = stack.enter_context(newest_held(RunDirectory.open(request.source), step))
    return prepare(replace(request, held=found.path.absolute()))


def _baseline(request: AnalysisRequest, main: Job, solo: Path, stack: ExitStack) -> Job:
    """The job of a solo baseline, on the same images."""
    if not (solo / "config.yaml").is_file():
        raise UserError(f"--solo {solo}: not a run directory (it has no config.yaml)")
    evaluation = request.evaluation
    images = replace(Request(solo), train=main.train.path, test=main.test.path)
    asked = replace(images, network=evaluation.network, overrides=evaluation.overrides)
    job = _prepared(asked, None, stack)
    known = [subject.name for subject in main.wanted]
    if len(job.wanted) != 1 or job.wanted[0].name not in known:
        raise UserError(
            f"--solo {solo}: has branches {', '.join(s.name for s in job.wanted)}; expected a run of one of "
            f"{', '.join(known)} alone"
        )
    if job.protocol != main.protocol:
        raise UserError(f"--solo {solo}: is evaluated otherwise than the run (evaluation.*, views.mean or views.std)")
    return job


def _folder(main: Job) -> Path:
    source = main.request.source
    return source.with_name(source.name + ".analysis") if source.is_file() else source / "analysis"


def _about(jobs: Sequence[Job]) -> dict[str, Any]:
    """What was analyzed, for every file of numbers."""
    main = jobs[0]
    networks = [
        {"branch": s.name, "alone": job is not main, "network": s.network, "step": s.step, "weights": s.checkpoint}
        for job in jobs
        for s in job.wanted
    ]
    return {"networks": networks, "test": str(main.test.path), "train": str(main.train.path)}
