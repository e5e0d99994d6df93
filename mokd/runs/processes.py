"""Is a process that we once started still the same one?"""

from __future__ import annotations

from pathlib import Path


def process_start(pid: int) -> str | None:
    """The kernel's start time of a living process, in ticks since boot; with the id it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the name in parentheses may hold anything, spaces included
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
