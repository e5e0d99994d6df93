"""What a person sees of long work: a live line on a terminal, plain lines in a log; always on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

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


def busy(text: str) -> AbstractContextManager[object]:
    """On a terminal, within the context: what is being done that cannot be counted."""
    return Console(stderr=True).status(text)


class WorkProgress:
    """Counted work: how much is done, of how much, and when it will be; nothing where not `shown`.

    Use it as a context. every_seconds: how far plain lines are apart, the first and the last come always.
    """

    def __init__(
        self,
        title: str,
        *,
        done: int = 0,
        every_seconds: float = EVERY_SECONDS,
        per_second: bool = True,
        shown: bool = True,
    ) -> None:
        self._title, self._first, self._every, self._shown = title, done, every_seconds, shown
        self._per_second = per_second
        self._started = time.monotonic()
        self._told = -every_seconds
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            # what matters comes first: a narrow terminal cuts off the end
            columns = (
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=len(title))),
                BarColumn(12),
                TextColumn("{task.fields[facts]}", markup=False),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(title, total=None, facts="")
            self._bar.start()

    def __enter__(self) -> WorkProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, total: int, facts: str = "") -> None:
        """So much of the whole is done; `facts` is what else there is to say."""
        if not self._shown:
            return
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._started, 1e-9)
        parts = [self._count(done, total), facts]
        if done > self._first:
            parts[1:1] = [f"{rate:.0f}/s"] * self._per_second + [f"ETA {duration((total - done) / rate)}"]
        text = "  ".join(part for part in parts if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, facts=text)
        elif now - self._told >= self._every or done >= total:
            self._told = now
            self.say(text)

    def _count(self, done: int, total: int) -> str:
        return f"{done} of {total}" if self._bar is not None else f"{self._title}: {done} of {total}"

    def say(self, text: str) -> None:
        """One line, above the live one."""
        if self._shown:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Ends the live line."""
        if self._bar is not None:
            self._bar.stop()


class TrainingProgress(WorkProgress):
    """Step, images/s, ETA, time waiting for data and the loss of every branch, at every logged step."""

    def __init__(self, total_steps: int, done: int) -> None:
        super().__init__("train", done=done, every_seconds=0.0, per_second=False)
        self._total, self._facts = total_steps, "waiting for the first step"
        self.at(done)
        if self._bar is not None:
            self._bar.refresh()

    def _count(self, done: int, total: int) -> str:
        return f"step {done}/{total}"

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the newest logged values."""
        losses = "  ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in values.items() if k.endswith("/total"))
        speed = f"{values['images_per_second']:.1f} images/s  data wait {100 * values['data_wait_fraction']:.0f}%"
        self._facts = f"epoch {int(values['epoch'])}  {speed}  loss {losses}"
        self.update(step, self._total, self._facts)

    def at(self, step: int) -> None:
        """A step that is not logged: the live line counts it, a log has no line for it."""
        if self._bar is not None:
            self.update(step, self._total, self._facts)
