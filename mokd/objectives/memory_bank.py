"""The memory bank of a branch: a ring buffer of its teacher's newest keys, the same on every rank.

Shape letters: V views, B images per rank, G images over all ranks, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mokd.config.objectives import BankConfig
from mokd.distributed.process_group import all_gather
from mokd.models.heads import unit_vectors
from mokd.runs.seeds import derive_seed


class MemoryBank:
    """The newest `size` keys `[size, D]`, the oldest overwritten first.

    It starts with random unit vectors, drawn from `seed`, so that the first queries have as many negatives as all later
    ones; they are overwritten like keys. `written` counts the keys it has been given; key n lies in row n % size.
    """

    def __init__(self, size: int, width: int, *, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        # on the CPU: the draws must not depend on the device
        generator = torch.Generator("cpu").manual_seed(seed)
        rows = torch.randn(size, width, generator=generator, dtype=torch.float32, device="cpu")
        self.keys = unit_vectors(rows).to(device, dtype)
        self.written = 0

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Writes keys `[N, D]` over the oldest ones, in their order; N at most `size`."""
        size, count = self.keys.shape[0], keys.shape[0]
        if count > size:
            raise ValueError(f"{count} keys at a time for a bank of {size}")
        start = self.written % size
        fitting = min(count, size - start)
        self.keys[start : start + fitting] = keys[:fitting]
        self.keys[: count - fitting] = keys[fitting:]
        self.written += count

    def age(self, keys_per_step: int) -> float:
        """Steps since the oldest key was written: `size / keys_per_step` once no random row is left."""
        return min(self.written, self.keys.shape[0]) / keys_per_step

    def state_tensors(self) -> dict[str, Tensor]:
        """The keys and the position."""
        return {"keys": self.keys, "written": torch.tensor(self.written, device="cpu")}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        self.keys.copy_(tensors["keys"])
        self.written = int(tensors["written"])


def memory_banks(bank: BankConfig, widths: Mapping[str, int], seed: int, device: torch.device) -> dict[str, MemoryBank]:
    """Banks by branch, of keys as wide as the branch's; each is drawn from the run's seed and its branch's name."""
    # fp32, unless everything is computed in more
    dtype = torch.bfloat16 if bank.storage == "bf16" else torch.get_default_dtype()
    seeds = {name: derive_seed(seed, "memory bank", name) for name in widths}
    return {n: MemoryBank(bank.size, width, seed=seeds[n], dtype=dtype, device=device) for n, width in widths.items()}


def bank_tensors(kind: str, banks: Mapping[str, MemoryBank]) -> dict[str, Tensor]:
    """The state of banks by branch, `<kind>/<branch>/{keys,written}`."""
    return {f"{kind}/{name}/{k}": tensor for name, bank in banks.items() for k, tensor in bank.state_tensors().items()}


def load_bank_tensors(kind: str, banks: Mapping[str, MemoryBank], tensors: Mapping[str, Tensor]) -> None:
    """Restores what `bank_tensors` gave."""
    for name, bank in banks.items():
        bank.load_state_tensors({key: tensors[f"{kind}/{name}/{key}"] for key in bank.state_tensors()})


def gather_keys(keys: Tensor) -> Tensor:
    """Keys `[n, V, B, D]` of n branches on this rank -> `[n, V * G, D]` of all ranks, in one collective.

    Ordered by view, then by place in the global batch, of which every rank has a contiguous part: the order does not
    depend on the number of ranks.
    """
    everywhere = all_gather(keys)  # [W, n, V, B, D]
    return everywhere.movedim(0, 2).flatten(1, 3)
