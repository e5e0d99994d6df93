"""Hyper-parameters that may be changed between two stretches of a run: each change is on record with its step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from mokd.checkpointing.reading import Checkpoint
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory


def record(run: RunDirectory, attempt: int, found: Checkpoint, now: Mapping[str, Any]) -> None:
    """Appends to `changes.jsonl` what differs from the checkpoint that training goes on from.

    now: values by key. A checkpoint from before these were saved says nothing.
    """
    then = found.state.get("changeable", {})
    known = [(line["step"], line["key"], line["after"]) for line in read_metrics(run.changes_file)]
    lines = [
        {"time": time.time(), "attempt": attempt, "step": found.step, "key": key, "before": then[key], "after": value}
        for key, value in now.items()
        if key in then and then[key] != value and (found.step, key, value) not in known
    ]
    if lines:
        with open(run.changes_file, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
