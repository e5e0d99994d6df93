"""Trains a run; one batch of the last rank holds a NaN.

usage: python -m tests.programs.train_poisoned RUN_DIRECTORY STEP
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from data_pipeline.loaders.batch import ViewBatch
from mokd.training import entry
from mokd.training.step import NonFiniteLossError
from mokd.training.trainer import Trainer


def main(directory: str, step: int) -> int:
    original = Trainer._train_step

    def poisoned(self: Trainer, batch: ViewBatch, epoch: int) -> bool:
        if self.step + 1 == step and self.ranks.rank == self.ranks.world_size - 1:
            batch.views[0][0, 1] = torch.nan
        return original(self, batch, epoch)

    Trainer._train_step = poisoned  # type: ignore[method-assign]
    try:
        entry.run(Path(directory))
    except NonFiniteLossError as error:
        return 7 if error.final else 8
    return 0


if __name__ == "__main__":
    entry.leave_at_once(main(sys.argv[1], int(sys.argv[2])))
