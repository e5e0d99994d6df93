"""Puts the same keys into a memory bank, as so many ranks see them; the first rank writes the bank.

usage: python -m tests.programs.push_keys OUTPUT.safetensors
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from mokd.distributed.process_group import barrier, join, leave, ranks_from_environment
from mokd.objectives.memory_bank import MemoryBank, gather_keys
from mokd.training.entry import leave_at_once

IMAGES, WIDTH, SIZE, STEPS = 8, 6, 44, 5


def step_keys(step: int) -> torch.Tensor:
    """The keys of a step for two branches, two views and all images, each with (step, branch, view, image) in it."""
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(IMAGES)).unflatten(0, (2, 2, IMAGES))
    numbered = torch.cat([torch.full((2, 2, IMAGES, 1), step), places], dim=-1)
    return torch.cat([numbered, torch.ones(2, 2, IMAGES, WIDTH - 4)], dim=-1)


def main(output: str) -> None:
    """Every storage in turn."""
    ranks = ranks_from_environment()
    join(ranks, torch.device("cpu"), 240)
    own = IMAGES // ranks.world_size
    state = {}
    for dtype in (torch.float32, torch.bfloat16):
        banks = [MemoryBank(SIZE, WIDTH, seed=i, dtype=dtype, device=torch.device("cpu")) for i in range(2)]
        for step in range(STEPS):
            mine = step_keys(step)[:, :, ranks.rank * own : (ranks.rank + 1) * own]
            for bank, keys in zip(banks, gather_keys(mine.to(dtype)), strict=True):
                bank.push(keys)
        for i, bank in enumerate(banks):
            state |= {f"{dtype}/{i}/{key}": value for key, value in bank.state_tensors().items()}
    if ranks.is_main:
        save_file(state, output)
    barrier()  # nobody closes its connections while another still needs them
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
    leave_at_once(0)
