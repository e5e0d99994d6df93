"""What a shell is told when somebody presses Tab, as its script asks for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

PROGRAM = "import sys; sys.argv = ['mokd']; from launcher.cli.main import main; main()"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("mokd tra", "train"), ("mokd convert --max", "--max-resolution"), ("mokd site in", "init")],
)
def test_words_are_completed(typed: str, completed: str) -> None:
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_MOKD_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [completed], done.stderr
