"""Trains a run with faults planted in its networks, its loader or a rank; the exit status is that of training.

usage: python -m tests.programs.train_faulty RUN_DIRECTORY [FAULT[=BRANCH|SECONDS] ...]

constant_teacher, uniform_teacher, dead_branch, one_direction, same_features: of a branch. slow_rank: the last rank
sleeps so long in every optimizer's step. starving_loader: every rank waits so long for every batch.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from data_pipeline.loaders.batch import ViewBatch
from mokd.objectives.branch import Branch
from mokd.training import entry
from mokd.training.trainer import Trainer


def rows_of(scale: float, branch: Branch) -> None:
    """Its teacher says of every image what it says of the first, times `scale`."""

    def replace(module: Any, inputs: Any, output: Any) -> Any:
        heads = {name: getattr(output, name) for name in ("mlp", "t_head")}
        same = {
            name: head._replace(rows=head.rows[:1, :1].expand_as(head.rows) * scale) for name, head in heads.items()
        }
        return output._replace(**same)

    branch.teacher.register_forward_hook(replace)


def dead(branch: Branch) -> None:
    """No gradient reaches its student."""
    for parameter in branch.student.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: None if g is None else torch.zeros_like(g))


def one_direction(branch: Branch) -> None:
    """Its student's features of all images differ along one direction alone, nearly."""

    def features(pooled: torch.Tensor) -> torch.Tensor:
        first, second = pooled[:2].detach()
        return first + 0.03 * second * pooled[:, :1] + 1e-5 * pooled  # little, or the unit sphere would bend the line

    _with_features(branch, features)


def same_features(branch: Branch) -> None:
    """Its student's features of all images are the same, up to a thousandth."""
    _with_features(branch, lambda pooled: pooled[:1].detach() + 1e-3 * pooled)


def _with_features(branch: Branch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    branch.student.backbone.register_forward_hook(
        lambda module, inputs, output: dataclasses.replace(output, pooled=change(output.pooled))
    )


def slow(trainer: Trainer, seconds: float) -> None:
    """The optimizers of the last rank sleep."""
    if trainer.ranks.rank + 1 < trainer.ranks.world_size:
        return
    for branch in trainer.branches:
        step = branch.optimizer.step

        def late(number: int, step: Any = step) -> float:
            time.sleep(seconds)
            return step(number)

        branch.optimizer.step = late  # type: ignore[method-assign]


def starve(trainer: Trainer, seconds: float) -> None:
    """Batches come late."""
    epoch = trainer.loader.epoch

    def late(*arguments: int) -> Generator[ViewBatch]:
        for batch in epoch(*arguments):
            time.sleep(seconds)
            yield batch

    trainer.loader.epoch = late  # type: ignore[method-assign]


def plant(trainer: Trainer, faults: list[str]) -> None:
    branches = {branch.name: branch for branch in trainer.branches}
    for fault in faults:
        name, _, value = fault.partition("=")
        match name:
            case "constant_teacher":
                rows_of(1.0, branches[value])
            case "uniform_teacher":
                rows_of(0.0, branches[value])
            case "dead_branch":
                dead(branches[value])
            case "one_direction":
                one_direction(branches[value])
            case "same_features":
                same_features(branches[value])
            case "slow_rank":
                slow(trainer, float(value))
            case "starving_loader":
                starve(trainer, float(value))
            case _:
                raise ValueError(fault)


def main(directory: str, *faults: str) -> int:
    original = Trainer.fit

    def fit(self: Trainer) -> Any:
        plant(self, list(faults))
        return original(self)

    Trainer.fit = fit  # type: ignore[method-assign]
    return entry.main([directory])


if __name__ == "__main__":
    entry.leave_at_once(main(*sys.argv[1:]))
