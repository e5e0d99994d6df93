"""Ranks on this machine: a mistake that all of them find is told by the first, however late it finds it."""

import sys

import pytest

from mokd.distributed.local_ranks import supervise
from mokd.runs.exit_codes import EXIT_USER

PROGRAM = f"""
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(1.0)
    print("error: what is wrong", file=sys.stderr)
sys.exit({EXIT_USER})
"""


def test_the_first_rank_may_say_what_is_wrong_when_another_has_left(capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise([sys.executable, "-c", PROGRAM], 2) == EXIT_USER
    assert capfd.readouterr().err == "error: what is wrong\n"
