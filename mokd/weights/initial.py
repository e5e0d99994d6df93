"""The first weights of a run: read from their source once, kept in `RUN/init/`, put into the networks at step 0.

`init/<branch>.safetensors` has the tensors under the names that a branch's network gives them; `init/<branch>.json`,
written last, says where they came from, with checksums. Ranks read these files alone: a node needs no network
connection, and a source that changes or goes away changes nothing of the run. A run that resumes reads neither.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from data_pipeline.core.errors import UserError
from mokd.checkpointing.reading import SavedTensors
from mokd.checkpointing.state import fill
from mokd.checkpointing.storage import step_directories
from mokd.config import RunConfig
from mokd.distributed.process_group import decided_by_main
from mokd.models.trainable import TrainableNetwork
from mokd.objectives.branch import Branch, TeachingBranch
from mokd.runs.files import beside_of, file_checksum, replace_json, sync_file
from mokd.runs.first_weights import facts_of, record_file, weights_file
from mokd.runs.run_directory import RunDirectory
from mokd.weights.sources import find

log = logging.getLogger(__name__)


def check(config: RunConfig, run: RunDirectory | None = None) -> None:
    """UserError for first weights that cannot be had or do not fit.

    Those that `run` has on record, or no longer needs because it has steps to resume from, are not looked for again.
    """
    for branch in config.branches:
        if branch.init is not None and not (run and (facts_of(run, branch) or step_directories(run))):
            find(branch, config.views.global_crops.size_px, config.data.channels)


def create_run(path: Path, config: RunConfig) -> RunDirectory:
    """A new run directory with its first weights in it. Errors as `RunDirectory.create` and `record`."""
    run = RunDirectory(path)
    if not run.config_file.exists():
        record(run, config)  # ahead of the configuration, which makes the directory a run
    return RunDirectory.create(path, config)


def record(run: RunDirectory, config: RunConfig) -> None:
    """Reads the first weights of every branch that has a source and puts them on record; what is there stays."""
    for branch in config.branches:
        if branch.init is None or facts_of(run, branch) is not None:
            continue
        found = find(branch, config.views.global_crops.size_px, config.data.channels)
        tensors = {**{f"backbone.{key}": value for key, value in found.backbone.items()}, **found.heads}
        file = weights_file(run, branch.name)
        try:
            run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.parent.mkdir(exist_ok=True)
            beside = beside_of(file)
            try:
                save_file({key: value.detach().contiguous().clone() for key, value in tensors.items()}, beside)
                sync_file(beside)
                os.replace(beside, file)
            finally:
                beside.unlink(missing_ok=True)
            facts = {**found.facts, "sha256": file_checksum(file)}
            replace_json(record_file(run, branch.name), facts, durable=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def load(run: RunDirectory, config: RunConfig, branches: Sequence[TeachingBranch]) -> None:
    """Puts the first weights into students and teachers at step 0, on this rank's pieces of them; all ranks call it.

    Of a run, a frozen branch takes the heads too where they are those of this run's objective.
    """
    if all(branch.init is None for branch in config.branches):
        return

    def verified() -> None:
        record(run, config)  # where nobody has prepared the run
        for branch in config.branches:
            facts, file = facts_of(run, branch), weights_file(run, branch.name)
            if facts is not None and file_checksum(file) != facts["sha256"]:
                raise UserError(f"{file}: has changed since it was recorded; remove {file.parent} to read it again")

    decided_by_main(verified)
    for branch in branches:
        if branch.config.init is None:
            continue
        with safe_open(weights_file(run, branch.name), framework="pt") as file:
            saved = SavedTensors(file, list(file.keys()))
            backbone = saved.below("backbone.")
            fill(branch.teacher.backbone, backbone, backbone.keys())
            if isinstance(branch, Branch):
                fill(branch.student.backbone, backbone, backbone.keys())
                continue
            # trained heads say more than random ones; those of a branch that learns are its own to learn
            heads = heads_for(branch.teacher, saved)
            fill(branch.teacher, saved, heads)
            if not dist.is_initialized() or dist.get_rank() == 0:
                log.info("%s: frozen, its heads are %s", branch.name, "the run's" if heads else "random or none")


def heads_for(network: TrainableNetwork, saved: SavedTensors) -> list[str]:
    """The keys of a network's heads, where all of them are saved in the shapes that it has; else none."""
    own = {key: list(value.shape) for key, value in network.state_dict().items() if not key.startswith("backbone.")}
    there = set(saved.keys())
    fits = all(key in there and saved.shape(key) == shape for key, shape in own.items())
    return list(own) if fits else []
