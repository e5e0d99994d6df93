"""What a task says of one network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mokd.evaluation.kept_state import KeptState
from mokd.evaluation.results import Int64Array, accuracy


@dataclass(frozen=True)
class Answer:
    """Predictions under one setting of the task (`results.SETTINGS`).

    classes: the most likely ones `[M, min(5, C)]` of every test image, likeliest first.
    """

    setting: float
    classes: Int64Array
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """All settings of a task. The headline is the answer at `preferred`, without it the most accurate one.

    states: what was kept for a call again and is of no use once the outcome is written.
    """

    answers: list[Answer]
    preferred: int | None = None
    states: list[KeptState] = field(default_factory=list)

    def headline(self, labels: Int64Array) -> int:
        """Which answer stands for the network."""
        if self.preferred is not None:
            return self.preferred
        return max(range(len(self.answers)), key=lambda i: accuracy(labels, self.answers[i].classes))
