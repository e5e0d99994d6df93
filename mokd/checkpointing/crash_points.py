"""Deliberate sudden ends, for the tests that prove what a save leaves behind when it is cut off."""

from __future__ import annotations

import os

VARIABLE = "MOKD_CRASH_AT"


def crash_point(name: str) -> None:
    """Ends the process at once, as a power cut would, when the environment names this point."""
    if os.environ.get(VARIABLE) == name:
        os._exit(137)
