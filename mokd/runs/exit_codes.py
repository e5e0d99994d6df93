"""The contract of exit statuses: what a process of a run leaves with, and what follows. The only place for it.

A rank, `mokd train` and the batch script keep it; docs/faults.md shows `table()`.
"""

from __future__ import annotations

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
