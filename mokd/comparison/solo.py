"""The solo baseline of a branch: the same run with that branch alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.config import RunConfig, load_config


def solo(config: RunConfig, branch: str, *, name: str | None = None) -> RunConfig:
    """`config` with `branch` alone and everything else as it is; named `<name>-solo-<branch>` unless `name` is given.

    Views, order of images, schedules, first weights and what stochastic depth draws are functions of the seed and of
    the branch's name, so they are those of the run in company; the cross terms are gone. UserError when there is no
    such branch, or when it has nothing to learn from alone.
    """
    chosen = [b for b in config.branches if b.name == branch]
    if not chosen:
        known = ", ".join(b.name for b in config.branches)
        raise UserError(f"--solo {branch}: no such branch in {config.name}; there are: {known}")
    name = name or f"{config.name}-solo-{branch}"
    alone = config.model_copy(update={"name": name, "branches": tuple(chosen)})
    return schema.validate(RunConfig, alone.model_dump(mode="json", by_alias=True), name)


def load_run_config(path: Path, overrides: Sequence[str], branch: str | None) -> RunConfig:
    """The configuration at `path` with `key=value` overrides, of one branch alone where `branch` names it.

    Its name says so: one given among the overrides is that of the pair, unless it already does.
    """
    config = load_config(path, overrides)
    if branch is None:
        return config
    return solo(config, branch, name=config.name if _says_so(config.name, branch) else None)


def _says_so(name: str, branch: str) -> bool:
    """Whether a run's name is one of `branch` alone; a sweep adds to the end of it."""
    return re.search(rf"-solo-{re.escape(branch)}(-|$)", name) is not None
