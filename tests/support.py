"""Small configurations and helpers that several tests share."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.core import schema
from mokd.config import BranchConfig, RunConfig

ROOT = Path(__file__).resolve().parent.parent

RESNET: dict[str, Any] = {
    "name": "resnet",
    "backbone": "resnet10t",
    "backbone_options": {"channels": [8, 8, 16, 16], "stem_width": 8, "zero_init_last": False},
    "weight": 1.0,
    "mlp_head": {"hidden": 32, "bottleneck": 16, "train_gain": False},
    "optimizer": {"kind": "sgd", "lr": 0.5, "min_lr": 0.001, "weight_decay": 1.0e-4},
    "t_head_group": {"lr": 0.01, "min_lr": 1.0e-4, "weight_decay": [0.04, 0.4], "decay_all": True},
    "teacher_temp_warmup_epochs": 3,
}
VIT: dict[str, Any] = {
    "name": "vit",
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "weight": 0.1,
    "drop_path": 0.1,
    "mlp_head": {"hidden": 32, "bottleneck": 16},
    "optimizer": {"kind": "adamw", "lr": 3.0e-3, "min_lr": 1.0e-5, "weight_decay": [0.04, 0.4]},
    "teacher_temp_warmup_epochs": 2,
}
THIRD: dict[str, Any] = {**VIT, "name": "vit_wide", "backbone_options": {**VIT["backbone_options"], "embed_dim": 36}}

DINO_ONLY = ("mlp_head", "t_head_group", "teacher_temp_warmup_epochs")

# changes that turn `tiny` into a contrastive run; the 16 keys of a step do not divide the bank
CONTRASTIVE: dict[str, Any] = {
    "objective": {"kind": "contrastive", "width": 16, "projection": {"hidden": 32}, "bank": {"size": 40}},
    "views__local_crops__count": 0,
}


# changes that turn `tiny` into a distillation of its second branch, whose weights a test puts where `init` says
SEED: dict[str, Any] = {
    "objective": {"kind": "seed", "projector": {"hidden": 32}, "queue": {"size": 40}},
    "views__local_crops__count": 0,
}
REGRESSION = {**SEED, "objective": {"kind": "regression", "projector": {"hidden": 32}}}


def frozen(branch: dict[str, Any], init: Path = Path("none.pth")) -> dict[str, Any]:
    """A branch that learns nothing."""
    return {**branch, "frozen": True, "init": str(init)}


def tiny(train: Path = Path("none.beton"), **changes: Any) -> dict[str, Any]:
    """A configuration that trains two small networks in moments; `changes` are key paths with '__' for '.'."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "objective": {"kind": "dino", "prototypes": 40, "t_head": {"width": 24, "depth": 1, "heads": 2}},
        "data": {"train": str(train), "workers": 1, "limit": 40},
        "views": {
            "global_crops": {"count": 2, "size_px": 32, "area_scale": [0.4, 1.0], "blur_probability": [0.5]},
            "local_crops": {"count": 3, "size_px": 16, "area_scale": [0.1, 0.4], "blur_probability": [0.5]},
        },
        "branches": [RESNET, VIT],
        "optim": {"epochs": 3, "global_batch": 8, "warmup_epochs": 1},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *above, key = path.split("__")
        node = raw
        for part in above:
            node = node.setdefault(part, {})
        node[key] = copy.deepcopy(value)
    objective = raw["objective"]
    kind = objective if isinstance(objective, str) else objective.get("kind")
    if kind != "dino":  # which alone has such parts
        raw["branches"] = [{k: v for k, v in branch.items() if k not in DINO_ONLY} for branch in raw["branches"]]
    return raw


def tiny_config(train: Path = Path("none.beton"), **changes: Any) -> RunConfig:
    """The validated form of `tiny`."""
    return schema.validate(RunConfig, tiny(train, **changes), "tiny")


def mokd(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
    return subprocess.run(
        command, cwd=cwd or ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False
    )


def single_branch(objective: Any, config: RunConfig, branch: BranchConfig, images: int, epoch_steps: int = 5) -> Any:
    """A branch of one process, with weights drawn from torch's state as it is."""
    from mokd.objectives.base import build_pair
    from mokd.objectives.branch import Branch, single_process
    from mokd.optim.optimizer import BranchOptimizer

    pair = build_pair(objective, branch, images)
    optimizer = BranchOptimizer(pair.student, branch, config.optim, config.lr_scale, epoch_steps)
    return Branch(branch, pair, single_process(pair), optimizer)


def losses_of(objective: Any, branches: Sequence[Any], views: Sequence[Any], epoch: int) -> list[Any]:
    """The loss of every branch on one batch of views."""
    taught = objective.teach(branches, views, epoch)
    objective.remember(taught)
    return [objective.loss(branch, branches, taught, views, epoch) for branch in branches]


def hub_cache(folder: Path, repository: str, **files: Any) -> None:
    """A repository as huggingface_hub keeps it in its cache."""
    from safetensors.torch import save_file

    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123")
    (place / "snapshots" / "0123").mkdir(parents=True)
    for name, content in files.items():
        target = place / "snapshots" / "0123" / name.replace("__", ".")
        target.write_text(json.dumps(content)) if name.endswith("json") else save_file(content, target)
