"""What the kernel says of processes that we have started: whether it is still the same one, what signals it catches."""

from __future__ import annotations

from pathlib import Path
from signal import Signals


def process_start(pid: int) -> str | None:
    """The kernel's start time of a living process; with the id it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the name in parentheses may hold anything, spaces included
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def catches(pid: int, signal: Signals) -> bool:
    """Whether a process has a handler for a signal; False where the kernel does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal - 1) & 1)
