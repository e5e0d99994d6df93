"""From a configuration to a trained run on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.config import RunConfig, with_absolute_paths
from mokd.distributed.local_ranks import train_locally
from mokd.runs.exit_codes import EXIT_USER
from mokd.runs.files import replace_text
from mokd.runs.heartbeat import living_here
from mokd.runs.progress import busy
from mokd.runs.run_directory import RunDirectory
from mokd.training.feasibility import check, data_identity


def prepare(config: RunConfig, root: Path, *, resume: bool, world_size: int, restart: bool = False) -> RunDirectory:
    """The run directory `root/<name>`, new or to be continued, after every check that needs no training.

    restart: begin at step 0; what the run has written so far is moved aside. UserError when the run exists and neither
    was asked for, or when it cannot work.
    """
    path = root / config.name
    exists = (path / "config.yaml").is_file()
    if exists and (pid := living_here(RunDirectory(path))) is not None:
        raise UserError(
            f"{path}: process {pid} is training it; end that first (kill {pid} saves), or: mokd status {path}"
        )
    config = with_absolute_paths(config, RunDirectory.open(path).config() if exists and resume else None)
    if exists and not (resume or restart):
        raise UserError(f"{path}: this run exists already; continue it with --resume, or set another name=...")
    check(config, world_size, RunDirectory(path) if exists else None)
    if exists and restart:
        from mokd.checkpointing import choose  # torch is imported only after the cheap checks

        print(f"{path}: begins at step 0; what there was is in {choose.restart(RunDirectory(path))}", file=sys.stderr)
        exists = False
    if not exists:
        from mokd.weights import initial

        return initial.create_run(path, config)
    run = RunDirectory.open(path)
    _check_resumable(run, config)
    replace_text(run.config_file, schema.dump_yaml(config), durable=True)
    return run


def _check_resumable(run: RunDirectory, config: RunConfig) -> None:
    from mokd.checkpointing import (
        choose,  # torch is imported only after the cheap checks
        state,
    )

    found = choose.to_resume_from(run, None)
    if found is not None:
        state.check_identity(found, state.identity(config, data_identity(config)))


def change(run: RunDirectory, overrides: Sequence[str], from_step: int | None) -> RunConfig:
    """Applies `key=value` to a run that is to be resumed, from a given step or its newest checkpoint.

    UserError for a key that may not change on the way. What changes is recorded once training goes on from there.
    """
    from mokd.checkpointing import choose, state

    config = with_absolute_paths(schema.load(RunConfig, run.config_file, overrides))
    expected = state.identity(config, data_identity(config))
    found = choose.newest(run) if from_step is None else choose.at_step(run, from_step)
    if found is not None:
        state.check_identity(found, expected)
    if found is not None and from_step is not None:
        choose.rewind(run, found)
    replace_text(run.config_file, schema.dump_yaml(config), durable=True)
    return config


def train(
    config: RunConfig, root: Path, *, resume: bool, nproc: int, restart: bool = False
) -> tuple[RunDirectory, int]:
    """Trains here: as one rank under torchrun or srun, else in `nproc` ranks of our own. Returns the exit status."""
    if "RANK" in os.environ or "SLURM_STEP_ID" in os.environ:
        return _train_as_rank(config, root, resume, restart)
    with busy("looking at images, networks and first weights"):
        run = prepare(config, root, resume=resume, restart=restart, world_size=nproc)
    ranks = "1 rank" if nproc == 1 else f"{nproc} ranks"
    print(f"{run.path}: starting {ranks}, each imports torch and builds its networks", file=sys.stderr)
    return run, train_locally(run.path, nproc)


def first_of_ranks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first, or the only one, of those that torchrun or srun has started."""
    of_srun = environ.get("SLURM_PROCID", "0") if "SLURM_STEP_ID" in environ else "0"
    return environ.get("RANK", of_srun) == "0"


def _train_as_rank(config: RunConfig, root: Path, resume: bool, restart: bool) -> tuple[RunDirectory, int]:
    from mokd.distributed.accelerators import pick_device, promised_gpus
    from mokd.distributed.process_group import decided_by_main, join, ranks_from_environment
    from mokd.training.entry import main

    ranks = ranks_from_environment()
    device = pick_device(ranks, config.parallel.device, promised_gpus(ranks))
    join(ranks, device, config.parallel.startup_timeout_seconds)
    try:
        # one rank prepares the directory, all hear whether it worked
        run = decided_by_main(
            lambda: prepare(config, root, resume=resume, restart=restart, world_size=ranks.world_size)
        )
    except UserError:
        if ranks.is_main:
            raise
        return RunDirectory(root / config.name), EXIT_USER
    return run, main([str(run.path)])
