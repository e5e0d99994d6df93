"""What a person sees while training: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

EVERY_SECONDS = 10.0


def duration(seconds: float) -> str:
    """A duration for people.

    >>> duration(59), duration(3723)
    ('59s', '1h02m')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class TrainingProgress:
    """Shows step, loss per branch, images/s, time waiting for data, and ETA on stderr."""

    def __init__(self, total_steps: int, done: int) -> None:
        self._total = total_steps
        self._first = done
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._console = Console(file=sys.stderr)
        if self._console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("train", total=total_steps, completed=done, facts="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the newest logged values."""
        elapsed = time.monotonic() - self._started
        remaining = elapsed / max(step - self._first, 1) * (self._total - step)
        losses = "  ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in values.items() if k.endswith("/total"))
        facts = (
            f"loss {losses}  {values['images_per_second']:.1f} images/s  "
            f"data wait {100 * values['data_wait_fraction']:.0f}%  ETA {duration(remaining)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        else:
            self.say(f"step {step}/{self._total}  epoch {int(values['epoch'])}  {facts}")

    def say(self, text: str) -> None:
        """One line, above the live one."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Ends the live line."""
        if self._bar is not None:
            self._bar.stop()


class EpochLines:
    """A line on stderr every ten seconds or so for work that goes by epochs; nothing where not `shown`."""

    def __init__(self, title: str, epochs: int, shown: bool) -> None:
        self._title, self._epochs, self._shown = title, epochs, shown
        self._first: int | None = None
        self._started = self._told = time.monotonic()

    def done(self, epochs: int, facts: str = "") -> None:
        """So many epochs are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = epochs - 1
        if not self._shown or (now - self._told < EVERY_SECONDS and epochs < self._epochs):
            return
        self._told = now
        remaining = (now - self._started) / (epochs - self._first) * (self._epochs - epochs)
        print(f"{self._title}: epoch {epochs} of {self._epochs}  {facts}  ETA {duration(remaining)}", file=sys.stderr)
