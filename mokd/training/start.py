"""From a configuration to a trained run on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.config import RunConfig
from mokd.distributed.local_ranks import train_locally
from mokd.runs.exit_codes import EXIT_USER
from mokd.runs.files import replace_text
from mokd.runs.run_directory import RunDirectory
from mokd.training.feasibility import check


def prepare(config: RunConfig, root: Path, *, resume: bool, world_size: int) -> RunDirectory:
    """The run directory `root/<name>`, new or to be continued, after every check that needs no training.

    UserError when the run exists and `resume` was not asked for, or when it cannot work.
    """
    path = root / config.name
    exists = (path / "config.yaml").is_file()
    if exists and not resume:
        raise UserError(f"{path}: this run exists already; continue it with --resume, or set another name=...")
    check(config, world_size)
    if not exists:
        return RunDirectory.create(path, config)
    run = RunDirectory.open(path)
    _check_resumable(run, config)
    replace_text(run.config_file, schema.dump_yaml(config), durable=True)
    return run


def _check_resumable(run: RunDirectory, config: RunConfig) -> None:
    from mokd.checkpointing import (
        state,  # torch is imported only after the cheap checks
        storage,
    )

    found = storage.newest(run)
    if found is not None:
        size = found.state["identity"].get("dataset_size")
        state.check_identity(found, state.identity(config, size))


def train(config: RunConfig, root: Path, *, resume: bool, nproc: int) -> tuple[RunDirectory, int]:
    """Trains here: as one rank under torchrun or srun, else in `nproc` ranks of our own. Returns the exit status."""
    if "RANK" in os.environ or "SLURM_STEP_ID" in os.environ:
        return _train_as_rank(config, root, resume)
    run = prepare(config, root, resume=resume, world_size=nproc)
    return run, train_locally(run.path, nproc)


def _train_as_rank(config: RunConfig, root: Path, resume: bool) -> tuple[RunDirectory, int]:
    from mokd.distributed.accelerators import pick_device, promised_gpus
    from mokd.distributed.process_group import broadcast_from_main, join, ranks_from_environment
    from mokd.training.entry import main

    ranks = ranks_from_environment()
    device = pick_device(ranks, config.parallel.device, promised_gpus(ranks))
    join(ranks, device, config.parallel.timeout_seconds)
    problem: str | None = None
    if ranks.is_main:  # one rank prepares the directory, all hear whether it worked
        try:
            prepare(config, root, resume=resume, world_size=ranks.world_size)
        except UserError as error:
            problem = str(error)
    problem = broadcast_from_main(problem)
    run = RunDirectory(root / config.name)
    if problem is not None:
        if ranks.is_main:
            raise UserError(problem)
        return run, EXIT_USER
    return run, main([str(run.path)])
