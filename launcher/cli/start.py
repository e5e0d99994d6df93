"""The program `mokd`: interrupted while it still imports, it ends at once and without a traceback."""

from __future__ import annotations

import signal


def main() -> None:
    """Imports the command line, then runs it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in a job in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launcher.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()
