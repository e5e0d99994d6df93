"""The real trainer with a pause in every step, as of larger networks: an hour of it costs two cores little.

An entry for `launcher.slurm.rank_entry`; MOKD_PAUSE_SECONDS says how long.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from data_pipeline.loaders.batch import ViewBatch
from mokd.distributed.stopping import StopRequest
from mokd.training import entry
from mokd.training.trainer import Outcome, Trainer


def run(directory: Path, stop: StopRequest) -> Outcome:
    """`mokd.training.entry.run`, slower."""
    original, pause = Trainer._train_step, float(os.environ["MOKD_PAUSE_SECONDS"])

    def slow(self: Trainer, batch: ViewBatch, epoch: int) -> bool:
        time.sleep(pause)
        return original(self, batch, epoch)

    Trainer._train_step = slow  # type: ignore[method-assign]
    return entry.run(directory, stop)
