"""Trains a run until a step and stops there as if a signal had come; the exit status is that of `mokd.training.entry`.

usage: python -m tests.programs.train_until RUN_DIRECTORY STEP [float64]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from data_pipeline.loaders.batch import ViewBatch
from mokd.distributed.stopping import StopRequest
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.training import entry
from mokd.training.trainer import Trainer


def main(directory: str, step: int, dtype: str = "float32") -> int:
    torch.set_default_dtype(getattr(torch, dtype))
    stop = StopRequest()
    original = Trainer._train_step

    def counted(self: Trainer, batch: ViewBatch, epoch: int) -> bool:
        if self.step + 1 == step and self.ranks.rank == self.ranks.world_size - 1:
            stop.request("the test asks the last rank only")
        views = [group.to(torch.get_default_dtype()) for group in batch.views]
        return original(self, dataclasses.replace(batch, views=views), epoch)

    Trainer._train_step = counted  # type: ignore[method-assign]
    outcome = entry.run(Path(directory), stop)
    return EXIT_DONE if outcome.state == "done" else EXIT_STOPPED


if __name__ == "__main__":
    entry.leave_at_once(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
