"""A run's state as tensors and scalars: collected for a checkpoint, checked and restored from one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.checkpointing.reading import Checkpoint, SavedTensors
from mokd.checkpointing.storage import Snapshot
from mokd.config import BranchConfig, RunConfig
from mokd.config.leaves import leaves
from mokd.distributed import sharding
from mokd.objectives.base import Objective
from mokd.objectives.branch import Branch, TeachingBranch

# keys that checkpoints from before them do not have; their defaults are what was done then
_YOUNGER = {
    "branch": ("frozen", "freeze_backbone_epochs", "weight_ramp"),
    "objective": ("ramps", "cross_same_view"),
}

OBJECTIVE_FILE = "objective"

# What a resumed run must have in common with its checkpoint: a different value would be another run.
FIXED = (
    *("seed", "objective", "views", "branches", "optim.epochs", "optim.global_batch", "optim.warmup_epochs"),
    *("data.order", "data.limit"),
)
# how to go on from a run where a key must differ
_FROM_HERE = {"optim.epochs": " with branches.N.init=run:RUN/BRANCH, since schedules span the epochs"}
# What may be changed on the way, openly: rates, decay, clipping, precision and the weights of terms.
_RATES = r"(lr|min_lr|weight_decay|layer_decay|backbone_lr_factor)(\.[01])?"
CHANGEABLE = re.compile(
    rf"branches\.\d+\.((optimizer|t_head_group)\.{_RATES}|weight|weight_ramp(\.\w+)?)|optim\.clip_grad_norm"
    r"|precision\.\w+|objective\.(cross_weight|residual_weight|ramps(\.\w+)*)"
)


def collect(branches: Sequence[TeachingBranch], objective: Objective[Any], *, main: bool) -> Snapshot:
    """Everything that changes while training, copied to host memory, by file; nothing where not `main`.

    Sharded tensors are put together one by one, so that no rank ever holds more than one of them in the device's
    memory. That is a collective: every rank calls this, unless nothing is sharded.
    """
    parts = {OBJECTIVE_FILE: objective.state_tensors(), **{branch_file(b.name): _branch_tensors(b) for b in branches}}
    return {name: _copy_to_host(tensors, main) for name, tensors in parts.items()}


def is_sharded(branches: Sequence[TeachingBranch]) -> bool:
    """Whether a rank holds only a piece of the state, so that collecting it takes all ranks."""
    return any(sharding.is_sharded(p) for branch in branches for p in branch.teacher.parameters())


def restore(checkpoint: Checkpoint, branches: Sequence[TeachingBranch], objective: Objective[Any]) -> None:
    """Puts a checkpoint's state into branches and objective; a rank reads only the rows that it holds."""
    objective.load_state_tensors(checkpoint.tensors(OBJECTIVE_FILE))
    for branch in branches:
        with checkpoint.open(branch_file(branch.name)) as saved:
            _fill(branch.teacher, saved.below("teacher."))
            if not isinstance(branch, Branch):
                continue
            _fill(branch.student, saved.below("student."))
            optimizer = saved.below("optimizer.")
            branch.optimizer.load_state_tensors(optimizer.keys(), optimizer.read)
            scale = saved.below("loss_scale.")
            if branch.loss_scale is not None and scale.names:  # else it was saved in another precision
                branch.loss_scale.load_state_tensors(scale.read)


def _fill(network: nn.Module, saved: SavedTensors) -> None:
    if different := network.state_dict().keys() ^ saved.keys():
        raise RuntimeError(f"the checkpoint is of another network: {', '.join(sorted(different)[:3])}")
    fill(network, saved, saved.keys())


@torch.no_grad()
def fill(network: nn.Module, saved: SavedTensors, keys: Iterable[str]) -> None:
    """Puts some saved tensors into a network; a rank reads only the rows that it holds."""
    into = network.state_dict()
    for key in keys:
        sharding.piece(into[key]).copy_(saved.read(key, sharding.own_rows(into[key])))


def _copy_to_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """An independent copy of every tensor, put together where it is sharded, safe to write while training goes on."""
    copies = {}
    for name, tensor in tensors.items():
        assembled = sharding.whole(tensor.detach())
        if not keep:
            continue
        if assembled.device.type == "cuda":
            # page-locked memory is several times as fast to copy to; torch keeps it for the next save
            copies[name] = torch.empty(assembled.shape, dtype=assembled.dtype, pin_memory=True)
            copies[name].copy_(assembled, non_blocking=True)
        else:
            # what was put together on a CPU is a copy already
            copies[name] = assembled.to(copy=not sharding.is_sharded(tensor)).contiguous()
    if keep and torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies


def branch_file(name: str) -> str:
    """Name of a branch's file in a checkpoint, without suffix."""
    return f"branch-{name}"


def network_tensors(checkpoint: Checkpoint, branch: str, network: str) -> dict[str, Tensor]:
    """The state dict of a branch's `student` or `teacher`."""
    return below(checkpoint.tensors(branch_file(branch)), f"{network}.")


def identity(config: RunConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two stretches of training parts of one run.

    data: size and fingerprint of the training images.
    """
    document = config.model_dump(mode="json")
    for branch in document["branches"]:
        del branch["activation_checkpointing"]  # changes memory and time, and nothing else
        _without_younger(branch, BranchConfig, "branch")
    _without_younger(document["objective"], type(config.objective), "objective")
    return {**{key: _at(document, key) for key in FIXED}, **data}


def _without_younger(section: dict[str, Any], model: type[BaseModel], kind: str) -> None:
    for key in _YOUNGER[kind]:
        if key in section and section[key] == _plain(model.model_fields[key].default):
            del section[key]


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def changeable(config: RunConfig) -> dict[str, Any]:
    """The values of everything that may be changed on the way, by key path."""
    document = config.model_dump(mode="json", include={"branches", "objective", "optim", "precision"})
    return {path: value for path, value in leaves(document, every_list=True) if CHANGEABLE.fullmatch(path)}


def check_identity(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    """UserError naming the first key in which the configuration differs, unless it may be changed (`CHANGEABLE`)."""
    found = checkpoint.state.get("identity", {})
    for key, value in expected.items():
        if key not in found:
            continue  # a checkpoint from before this was part of it
        for path, given, saved in _differences(key, value, found[key]):
            if CHANGEABLE.fullmatch(path):
                continue
            raise UserError(
                f"{checkpoint.path}: cannot resume, {path} is {given!r} now and was {saved!r} when it was saved; "
                f"set it back, or start a run of another name{_FROM_HERE.get(path, '')}"
            )


def _differences(path: str, now: Any, then: Any) -> Iterator[tuple[str, Any, Any]]:
    """Key paths in which two values differ, with both."""
    if isinstance(now, dict) and isinstance(then, dict):
        for key in [*now, *(k for k in then if k not in now)]:
            yield from _differences(f"{path}.{key}", now.get(key), then.get(key))
    elif isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for i, (a, b) in enumerate(zip(now, then, strict=True)):
            yield from _differences(f"{path}.{i}", a, b)
    elif now != then:
        yield path, _short(now), _short(then)


def _short(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "name" in value[0]:
        return [item["name"] for item in value]
    return value


def _branch_tensors(branch: TeachingBranch) -> dict[str, Tensor]:
    parts = {"teacher": branch.teacher.state_dict()}
    if isinstance(branch, Branch):
        parts |= {
            "student": branch.student.state_dict(),
            "optimizer": branch.optimizer.state_tensors(),
            "loss_scale": branch.loss_scale.state_tensors() if branch.loss_scale else {},
        }
    return {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, named without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[key]
    return document
