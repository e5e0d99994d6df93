"""A textfile for the collector of Prometheus' node_exporter, replaced whole at every logged step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mokd.loggers.base import Continued, Logger
from mokd.runs.files import read_json, replace_text
from mokd.runs.metrics import read_metrics, useful_seconds
from mokd.runs.run_directory import RunDirectory

_ABOUT = {
    "step": ("gauge", "Steps done."),
    "images_per_second": ("gauge", "Images per second over all ranks, since the step logged before."),
    "data_wait_fraction": ("gauge", "Part of the time that the slowest rank waited for data."),
    "alarms": ("gauge", "Alarms that hold."),
    "restarts_total": ("counter", "Attempts before this one."),
    "goodput_ratio": ("gauge", "Time of the steps that are in the run over the time for which it held its nodes."),
    "logged_timestamp_seconds": ("gauge", "When this was written."),
}


class Prometheus(Logger):
    """Labels are `run` and `job_id`, empty outside of SLURM. The file stays as it is when the run ends."""

    def __init__(self, path: Path, attempt: int, continued: Continued) -> None:
        self._path, self._attempt = path, attempt
        labels = {"run": continued.run.path.name, "job_id": os.environ.get("SLURM_JOB_ID", "")}
        self._labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        self._useful = useful_seconds(continued.kept)
        self._images = max((int(r["images_seen"]) for r in continued.kept if r.get("images_seen")), default=0)
        self._held_before = sum(_held(continued.run, number) for number in range(1, attempt))
        facts = read_json(continued.run.attempt_file(attempt)) or {}
        self._began = float(facts.get("time", time.time()))
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Replaces the file, where the values are those of training."""
        if "images_per_second" not in values:
            return
        now, seen = time.time(), int(values["images_seen"])
        stalled = values.get("save_stall_seconds", 0.0)
        self._useful += (seen - self._images) / values["images_per_second"] - stalled
        self._images = seen
        held = self._held_before + now - self._began
        shown = {
            "step": step,
            **{key: values[key] for key in ("images_per_second", "data_wait_fraction", "alarms") if key in values},
            "restarts_total": self._attempt - 1,
            "goodput_ratio": min(self._useful / held, 1.0) if held > 0 else 0.0,
            "logged_timestamp_seconds": now,
        }
        # the collector takes *.prom only: the hidden file beside it, from which this one is renamed, is none
        replace_text(self._path, "".join(self._lines(shown)))
        self._path.chmod(0o644)  # node_exporter is somebody else

    def _lines(self, shown: Mapping[str, float]) -> Iterator[str]:
        for name, value in shown.items():
            kind, meaning = _ABOUT[name]
            yield f"# HELP mokd_{name} {meaning}\n# TYPE mokd_{name} {kind}\n"
            yield f"mokd_{name}{{{self._labels}}} {value:.12g}\n"


def _held(run: RunDirectory, attempt: int) -> float:
    """Seconds for which an earlier attempt is known to have run: to its last change of phase."""
    facts = read_json(run.attempt_file(attempt)) or {}
    phases = read_metrics(run.phases_file(attempt))
    return max(0.0, float(phases[-1]["time"]) - float(facts["time"])) if phases and "time" in facts else 0.0


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
