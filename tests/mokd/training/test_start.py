"""A run's directory as `mokd train` makes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mokd.training.start import prepare
from tests.support import tiny_config


def test_paths_are_stored_as_the_first_call_means_them(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beton.parent)
    names = {"evaluation__train": "train.beton", "evaluation__test": "test.beton"}
    transfer = {f"evaluation__transfer__{key}": f"{key}.beton" for key in ("train", "test")}
    run = prepare(tiny_config(Path("train.beton"), **names, **transfer), tmp_path, resume=False, world_size=1)
    monkeypatch.chdir(tmp_path)  # a resume comes from elsewhere
    config = run.config()
    test = beton.with_name("test.beton")
    assert config.data.train == beton
    assert (config.evaluation.train, config.evaluation.test) == (beton, test)
    assert (config.evaluation.transfer.train, config.evaluation.transfer.test) == (beton, test)
    # the same words mean the same files there, and other words what they mean from there
    again = prepare(tiny_config(Path("train.beton"), **names, **transfer), tmp_path, resume=True, world_size=1)
    assert again.config() == config
    (tmp_path / "elsewhere.beton").symlink_to(test)
    moved = tiny_config(Path("train.beton"), **names | {"evaluation__test": "elsewhere.beton"}, **transfer)
    assert prepare(moved, tmp_path, resume=True, world_size=1).config().evaluation.test == tmp_path / "elsewhere.beton"
