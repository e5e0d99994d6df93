"""What is on record of a run's first weights, in `RUN/init/`; reading it needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mokd.config import BranchConfig
from mokd.runs.files import read_json
from mokd.runs.run_directory import RunDirectory


def weights_file(run: RunDirectory, branch: str) -> Path:
    """The tensors, under the names that the branch's network gives them."""
    return run.initial_weights / f"{branch}.safetensors"


def record_file(run: RunDirectory, branch: str) -> Path:
    """Where they came from: `init`, `source` in words, `sha256` of the file of tensors, and what else is known."""
    return run.initial_weights / f"{branch}.json"


def facts_of(run: RunDirectory, branch: BranchConfig) -> dict[str, Any] | None:
    """The record of a branch's first weights; None where they are random, or not read yet."""
    if branch.init is None:
        return None
    facts = read_json(record_file(run, branch.name))
    known = isinstance(facts, dict) and facts.get("init") == branch.init and weights_file(run, branch.name).is_file()
    return facts if known else None


def words(run: RunDirectory, branch: BranchConfig) -> str:
    """Where a branch's first weights came from, in a line for people."""
    if branch.init is None:
        return "random"
    facts = facts_of(run, branch)
    return f"{facts['source']}, SHA-256 {facts['sha256'][:16]}" if facts else branch.init
