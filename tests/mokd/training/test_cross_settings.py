"""The settings of the cross terms together, in runs that are interrupted, and beside runs without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mokd.distributed.local_ranks import supervise, train_locally
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from tests.mokd.training.test_resume import STEPS, final_state, run_directory, steps
from tests.support import RESNET, VIT

# five steps an epoch: one term begins at the sixth step, and one branch stops learning from the other at the eleventh
ENDS = {"start": 2.0, "first": 1.0, "last": 0.0}
SETTINGS: dict[str, Any] = {
    "objective__ramps": {"cross_mlp": {"start": 1.0}, "cross_search": {"length": 1.0}},
    "objective__cross_same_view": True,
    "objective__center_search": True,
    "branches": [{**RESNET, "weight_ramp": ENDS}, VIT],
}


def until(path: Path, step: int, ranks: int, *dtype: str) -> None:
    program = [sys.executable, "-m", "tests.programs.train_until", str(path), str(step), *dtype]
    assert supervise(program, ranks) == (EXIT_DONE if step == STEPS else EXIT_STOPPED)


def test_interrupted_and_resumed_is_bit_identical(beton: Path, tmp_path: Path) -> None:
    """On two ranks and in micro-batches; stopped ahead of the step at which a term begins, and after it."""
    changes = {**SETTINGS, "optim__accumulate": 2}
    whole, cut = (run_directory(tmp_path / name, beton, **changes) for name in ("whole", "cut"))
    assert train_locally(whole.path, 2) == EXIT_DONE
    for stop_at in (5, 7):
        until(cut.path, stop_at, 2)
    assert train_locally(cut.path, 2) == EXIT_DONE
    expected, found = final_state(whole), final_state(cut)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert steps(whole) == steps(cut)


def test_before_the_terms_begin_a_run_is_the_same_bits_without_them(beton: Path, tmp_path: Path) -> None:
    waiting = {term: {"start": 1.0} for term in ("cross_mlp", "cross_search")}
    ends = []
    for name, settings in (("with", SETTINGS), ("without", {})):
        run = run_directory(tmp_path / name, beton, **{**settings, "objective__ramps": waiting})
        until(run.path, 5, 1)
        folder = run.checkpoints / "step-5"
        ends.append(
            {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        )
    ours, theirs = ends
    assert len(theirs) > 50
    assert [key for key, value in theirs.items() if not torch.equal(ours[key], value)] == []
