"""What a task of `mokd eval` is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks
from mokd.evaluation.data import LabelledSet
from mokd.evaluation.subjects import Subject


@dataclass(frozen=True)
class Work:
    """Networks to evaluate and on what. directory: where features and unfinished states are kept."""

    subjects: list[Subject]
    train: LabelledSet
    test: LabelledSet
    config: RunConfig
    ranks: Ranks
    device: torch.device
    directory: Path
