import os
import socket
import uuid
from pathlib import Path

import pytest

from launcher.slurm.sbatch_script import TEARDOWN
from mokd.runs import files
from mokd.runs.exit_codes import CONTRACT, DECIDED, EXIT_FAILED, EXIT_GAVE_UP, status_of_error, table
from tests.support import ROOT


def test_the_documentation_shows_the_contract() -> None:
    assert table() in (ROOT / "docs" / "faults.md").read_text()
    assert set(DECIDED) < set(CONTRACT)
    assert "  0|2|3) again=no ;;" in TEARDOWN


def test_an_error_that_would_come_again_says_so() -> None:
    error = RuntimeError("x")
    assert status_of_error(error) == EXIT_FAILED
    error.final = True  # type: ignore[attr-defined]
    assert status_of_error(error) == EXIT_GAVE_UP


def test_temporary_names_differ_where_process_ids_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    assert len({files.beside_of(tmp_path / "status.json") for _ in range(100)}) == 100
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    one = files.beside_of(tmp_path / "status.json")
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert files.beside_of(tmp_path / "status.json") != one
