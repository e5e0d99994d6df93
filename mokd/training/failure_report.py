"""What a run that has met a non-finite loss knows of it: `failures/step-<n>/`, written by every rank before it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from data_pipeline.loaders.batch import ViewBatch
from mokd.distributed.process_group import Ranks, gather_objects
from mokd.distributed.sharding import piece
from mokd.objectives.branch import Branch
from mokd.runs.files import replace_json
from mokd.runs.run_directory import RunDirectory
from mokd.training.step import NonFiniteLossError

NAMED_SAMPLES = 8


def write(
    run: RunDirectory,
    error: NonFiniteLossError,
    batch: ViewBatch,
    branches: Sequence[Branch],
    ranks: Ranks,
    monitors: Mapping[str, Any],
) -> str:
    """Writes this rank's `rank-<r>.json` and, on the first rank, `monitors.json`: the newest finite metrics.

    Returns the error in one line with the samples of the ranks where most was not finite. All ranks call it.
    """
    broken = [name for name, value in error.own.items() if not math.isfinite(value)]
    ids = batch.sample_ids.tolist()
    views_finite = all(bool(torch.isfinite(group).all()) for group in batch.views)
    record = {
        "step": error.step,
        "rank": ranks.rank,
        "not_finite": broken,
        "views_finite": views_finite,
        "loss_terms": {name: _number(value) for name, value in error.own.items()},
        "sample_ids": ids,
        "labels": batch.labels.tolist(),
        "norms": {branch.name: _norms(branch) for branch in branches},
    }
    folder = run.failures / f"step-{error.step}"
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / f"rank-{ranks.rank}.json", record, durable=True)
    if ranks.is_main:
        replace_json(folder / "monitors.json", dict(monitors), durable=True)
    # BatchNorm over all ranks spreads what is not finite: the rank where most is broken is where it came from
    suspicion = (not views_finite, len(broken))
    everybody = gather_objects((suspicion, ranks.rank, ids))
    worst = max(suspicion for suspicion, _, _ in everybody)
    where = [f"rank {rank}, samples {_shown(own)}" for suspicion, rank, own in everybody if suspicion == worst]
    return (
        f"{error} ({'; '.join(where)}). All that is known is in {folder}. To go on with other rates or precision: "
        f"mokd resume {run.path} --from-step N precision.compute=fp32"
    )


def _shown(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - NAMED_SAMPLES} more" if len(ids) > NAMED_SAMPLES else ""
    return ", ".join(map(str, ids[:NAMED_SAMPLES])) + more


def _norms(branch: Branch) -> dict[str, dict[str, float | str]]:
    """Euclidean norms by parameter, of what this rank holds: student, its gradient, teacher."""
    norms: dict[str, dict[str, float | str]] = {}
    teacher = dict(branch.teacher.named_parameters())
    for name, p in branch.student.named_parameters():
        values = {"student": p.detach(), "gradient": p.grad, "teacher": teacher[name].detach()}
        norms[name] = {what: _norm(value) for what, value in values.items() if value is not None}
    return norms


def _norm(tensor: torch.Tensor | nn.Parameter) -> float | str:
    return _number(float(torch.linalg.vector_norm(piece(tensor).float())))


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: their names stand for them."""
    return value if math.isfinite(value) else str(value)
