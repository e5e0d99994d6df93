"""What can be evaluated: a branch's teacher or student at a checkpoint, its untrained network, or a file of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.errors import UserError
from mokd.checkpointing import hold, state
from mokd.checkpointing.reading import Checkpoint
from mokd.config import BranchConfig, RunConfig
from mokd.models.backbones import Backbone, build_backbone
from mokd.runs.files import checksum, file_checksum
from mokd.runs.run_directory import RunDirectory
from mokd.runs.seeds import derive_seed
from mokd.weights.formats import load_weights


@dataclass(frozen=True)
class Subject:
    """One backbone to evaluate.

    step, checkpoint: what it was trained for and where it lies, for the record. identity: what its weights follow from.
    build: makes it, with stochastic depth for so many images per rank where it is to be trained further.
    """

    name: str
    network: str
    step: int
    checkpoint: str
    identity: dict[str, Any]
    build: Callable[[float, int], Backbone]

    def load(self) -> Backbone:
        """The network as it is evaluated frozen."""
        return self.build(0.0, 1)


def from_run(run: RunDirectory, config: RunConfig, network: str, held: Path | None) -> list[Subject]:
    """All branches of a run at a checkpoint that is held, or as they were before any training (`scratch`)."""
    if network == "scratch" or held is None:
        return [_untrained(branch, config) for branch in config.branches]
    found, place = hold.open_held(held), run.checkpoints / held.name
    # a frozen branch has a teacher alone
    there = [branch for branch in config.branches if not (branch.frozen and network == "student")]
    return [_saved(found, str(place), branch, config, network) for branch in there]


def _identity(branch: BranchConfig, config: RunConfig, **weights: str | int) -> dict[str, Any]:
    built_from = branch.model_dump(mode="json", include={"backbone", "backbone_options", "stem"})
    return {**built_from, "image_px": config.views.global_crops.size_px, **weights}


def _saved(found: Checkpoint, place: str, branch: BranchConfig, config: RunConfig, network: str) -> Subject:
    def build(drop_path: float, images_per_rank: int) -> Backbone:
        backbone = _random(branch, config, drop_path, images_per_rank)
        backbone.load_state_dict(state.below(state.network_tensors(found, branch.name, network), "backbone."))
        return backbone

    weights = found.checksums[f"{state.branch_file(branch.name)}.safetensors"]
    identity = _identity(branch, config, weights=weights, network=network)
    return Subject(branch.name, network, found.step, place, identity, build)


def _untrained(branch: BranchConfig, config: RunConfig) -> Subject:
    def build(drop_path: float, images_per_rank: int) -> Backbone:
        with torch.random.fork_rng():
            # the weights from which the branch started
            torch.manual_seed(derive_seed(config.seed, "initial weights", branch.name))
            return _random(branch, config, drop_path, images_per_rank)

    return Subject(branch.name, "scratch", 0, "", _identity(branch, config, seed=config.seed), build)


def from_file(path: Path, config: RunConfig) -> list[Subject]:
    """The one branch of `config` with the weights in a file."""
    (branch,) = config.branches

    def build(drop_path: float, images_per_rank: int) -> Backbone:
        backbone = _random(branch, config, drop_path, images_per_rank)
        load_weights(backbone, path, f"'{branch.backbone}'")
        return backbone

    build(0.0, 1)  # a file that does not fit is refused now
    identity = _identity(branch, config, weights=file_checksum(path))
    return [Subject(branch.name, "weights", 0, str(path), identity, build)]


def _random(branch: BranchConfig, config: RunConfig, drop_path: float, images_per_rank: int) -> Backbone:
    image_px, channels = config.views.global_crops.size_px, config.data.channels
    with torch.random.fork_rng():
        return build_backbone(branch, image_px, drop_path=drop_path, images_per_rank=images_per_rank, channels=channels)


def chosen(subjects: Sequence[Subject], branches: Sequence[str]) -> list[Subject]:
    """Those of the given names, all of them without names. UserError for a name that there is not."""
    known = [subject.name for subject in subjects]
    for name in branches:
        if name not in known:
            raise UserError(f"--branch: no branch '{name}'; there are {', '.join(known)}")
    return [subject for subject in subjects if subject.name in branches or not branches]


def digest(**parts: Any) -> str:
    """A name for a combination of JSON values."""
    return checksum(json.dumps(parts, sort_keys=True, default=str).encode())[:24]
