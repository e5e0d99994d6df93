from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mokd.distributed.local_ranks import supervise
from mokd.objectives.memory_bank import MemoryBank
from tests.programs.push_keys import IMAGES, SIZE, STEPS, step_keys

CPU = torch.device("cpu")


def bank_of(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> MemoryBank:
    return MemoryBank(size, 3, seed=seed, dtype=dtype, device=CPU)


def numbered(first: int, count: int) -> Tensor:
    """Keys that tell which one they are."""
    return torch.arange(first, first + count, dtype=torch.float32).unsqueeze(1).expand(count, 3)


def test_starts_with_unit_vectors_that_the_seed_decides() -> None:
    bank = bank_of(200)
    torch.testing.assert_close(bank.keys.norm(dim=1), torch.ones(200))
    assert bank.keys.mean(dim=0).abs().max() < 0.2
    assert torch.equal(bank.keys, bank_of(200).keys)
    assert not torch.equal(bank.keys, bank_of(200, seed=1).keys)
    assert bank.written == 0
    assert bank.age(7) == 0.0


@pytest.mark.parametrize(
    ("size", "count"), [(12, 4), (10, 4), (7, 5), (4, 4)], ids=["divides", "odd", "barely larger", "whole"]
)
def test_the_newest_keys_take_the_places_of_the_oldest(size: int, count: int) -> None:
    bank = bank_of(size)
    expected = [row.tolist() for row in bank.keys]
    place = 0
    for step in range(9):
        keys = numbered(step * count, count)
        bank.push(keys)
        for row in keys:  # one key at a time
            expected[place] = row.tolist()
            place = (place + 1) % size
        assert bank.keys.tolist() == expected
        written = (step + 1) * count
        assert bank.written == written
        assert bank.age(count) == min(written, size) / count
    newest = {int(row[0]) for row in bank.keys}
    assert newest == set(range(9 * count - size, 9 * count))


def test_more_keys_at_a_time_than_the_bank_holds_are_refused() -> None:
    bank = bank_of(4)
    before = bank.keys.clone()
    with pytest.raises(ValueError, match="5 keys at a time for a bank of 4"):
        bank.push(numbered(0, 5))
    assert torch.equal(bank.keys, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_bank_goes_on_like_the_one_that_was_saved(dtype: torch.dtype) -> None:
    bank, other = bank_of(10, dtype=dtype), bank_of(10, seed=5, dtype=dtype)
    for step in range(4):
        bank.push(numbered(4 * step, 4).to(dtype))
    other.load_state_tensors({key: value.clone() for key, value in bank.state_tensors().items()})
    for b in (bank, other):
        b.push(numbered(16, 4).to(dtype))
    assert other.keys.dtype == dtype
    assert torch.equal(bank.keys, other.keys)
    assert bank.written == other.written == 20


def test_the_bank_is_the_same_bits_on_1_2_and_4_ranks(tmp_path: Path) -> None:
    states = []
    for ranks in (1, 2, 4):
        output = tmp_path / f"{ranks}.safetensors"
        assert supervise([sys.executable, "-m", "tests.programs.push_keys", str(output)], ranks) == 0
        states.append(load_file(output))
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[key], value) for key, value in states[0].items())
    # by step, then view, then place in the global batch
    for i in range(2):
        rows = states[0][f"torch.float32/{i}/keys"]
        for n in range(STEPS * 2 * IMAGES - SIZE, STEPS * 2 * IMAGES):
            step, view, image = n // (2 * IMAGES), n // IMAGES % 2, n % IMAGES
            assert torch.equal(rows[n % SIZE], step_keys(step)[i, view, image].float())
