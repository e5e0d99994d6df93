"""A run at step 0 in this rank, as it is before the first step; the first rank writes its state and its features.

usage: python -m tests.programs.step_zero RUN_DIRECTORY OUTPUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mokd.checkpointing import state
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import barrier, join, leave, ranks_from_environment
from mokd.distributed.stopping import StopRequest
from mokd.runs.heartbeat import Heartbeat
from mokd.runs.run_directory import RunDirectory
from mokd.training.entry import leave_at_once
from mokd.training.trainer import Trainer


def main(directory: str, output: str) -> None:
    torch.set_num_threads(1)
    run, ranks = RunDirectory.open(Path(directory)), ranks_from_environment()
    device = pick_device(ranks)
    join(ranks, device, 240)
    if ranks.is_main:
        run.claim_attempt()
    barrier()
    attempt = run.current_attempt()
    heartbeat = Heartbeat(run, attempt, ranks.rank, {})
    trainer = Trainer(run, run.config(), ranks, device, StopRequest(), attempt, heartbeat)
    assert trainer.step == 0
    files = state.collect(trainer.branches, trainer.objective, main=True)
    if ranks.is_main:
        save_file({f"{name}/{key}": tensor for name, file in files.items() for key, tensor in file.items()}, output)
    barrier()
    heartbeat.close()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_at_once(0)
