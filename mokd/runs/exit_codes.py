"""The contract of exit statuses: what a process of a run leaves with, and what follows. The only place for it.

A rank, `mokd train` and the batch script keep it; docs/faults.md shows `table()`.
"""

from __future__ import annotations

import errno

from data_pipeline.core.errors import DataError

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_GAVE_UP, EXIT_STOPPED, EXIT_SUPERSEDED = 0, 1, 2, 3, 75, 76

# status: its name, what it says, and what the launcher makes of it
CONTRACT = {
    EXIT_DONE: ("done", "all steps done; of a batch script: done, or in good hands", "nothing"),
    EXIT_FAILED: ("failed", "an error that another try may not meet again", "requeued, within `cluster`'s bounds"),
    EXIT_USER: ("user error", "a mistake in what was given", "stops, never requeued"),
    EXIT_GAVE_UP: ("failed for good", "every further try would end the same way", "stops, never requeued"),
    EXIT_STOPPED: ("stopped", "asked to stop, and resumable", "requeued"),
    EXIT_SUPERSEDED: ("superseded", "a newer attempt or launch has taken over", "leaves, nothing is recorded"),
}
# a batch script leaves with these after its supervisor has decided
DECIDED = (EXIT_DONE, EXIT_USER, EXIT_GAVE_UP)


def table() -> str:
    """The contract as a table in Markdown."""
    rows = [f"| {status} | {name} | {says} | {then} |" for status, (name, says, then) in CONTRACT.items()]
    return "\n".join(["| status | name | what it says | what follows |", "|---|---|---|---|", *rows])


def status_of_error(error: BaseException) -> int:
    """What a process leaves with after an error: one that bears `final = True` would come again at every try."""
    return EXIT_GAVE_UP if getattr(error, "final", False) else EXIT_FAILED


def says_all(error: BaseException) -> bool:
    """Whether an error's own line tells its reader all, and a traceback adds nothing: a damaged sample, a loss that is
    not finite, a full disk, a file that cannot be read or written.
    """
    if isinstance(error, OSError):
        # without a number it is one of ours
        return error.errno in (None, errno.ENOSPC, errno.EDQUOT) or error.filename is not None
    return isinstance(error, DataError) or getattr(error, "final", False)
