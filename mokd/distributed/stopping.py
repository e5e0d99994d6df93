"""Stop requests: a signal only sets a flag; the trainer lets all ranks agree on it at a step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# SIGTERM is the last to be routed: of a rank that catches it the others are too
STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class StopRequest:
    """A flag with a reason. Handlers do nothing else, so a storm of signals changes nothing."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Asks the run to save and stop at the next step boundary; the first reason stays."""
        if self.reason is None:
            self.reason = reason

    def install(self) -> None:
        """Routes this process's stop signals here; only the main thread can, elsewhere nothing happens."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
