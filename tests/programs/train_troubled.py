"""Trains a run; ahead of a step the last rank sleeps, or fails. Prints whether the process group outlives a failure.

usage: python -m tests.programs.train_troubled RUN_DIRECTORY STEP SECONDS|fail
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch.distributed as dist

from data_pipeline.loaders.batch import ViewBatch
from mokd.distributed.process_group import abandon
from mokd.runs.files import replace_json
from mokd.training import entry
from mokd.training.trainer import Trainer


def main(directory: str, step: int, trouble: str) -> int:
    original = Trainer._train_step

    def troubled(self: Trainer, batch: ViewBatch, epoch: int) -> bool:
        if self.step + 1 == step and self.ranks.rank == self.ranks.world_size - 1:
            if trouble == "fail":
                raise ValueError("this rank is broken")
            time.sleep(float(trouble))
        return original(self, batch, epoch)

    Trainer._train_step = troubled  # type: ignore[method-assign]
    try:
        entry.run(Path(directory))
    except ValueError as error:
        # the word can be left while the group is there, which on GPUs may take long to leave
        status = {"word": str(error), "in_group": dist.is_initialized()}
        abandon()
        replace_json(Path(directory) / "seen.json", {**status, "after": dist.is_initialized()})
        return 1
    except RuntimeError as error:
        print(f"another rank's trouble: {error}", file=sys.stderr)
        if trouble == "fail":
            time.sleep(60.0)  # until the one whose fault it is has ended, whose exit status counts
        return 3
    return 0


if __name__ == "__main__":
    entry.leave_at_once(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
