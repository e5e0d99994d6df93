"""Alarms on record: `alarms.jsonl` of the run, and the command that is told of a new one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mokd.config import RunConfig
from mokd.monitoring.alarms import Alarm, Rules, replay
from mokd.runs.metrics import keep_up_to, read_metrics
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)


class AlarmLog:
    """The alarms of a run from the step that it goes on from; the first rank has it. Later ones on file are dropped."""

    def __init__(self, run: RunDirectory, config: RunConfig, epoch_steps: int, step: int) -> None:
        self._run, self._command = run, config.logging.on_alarm
        self._rules = Rules(config, epoch_steps)
        self._running: list[subprocess.Popen[bytes]] = []
        keep_up_to(run.alarms_file, step)
        replay(self._rules, [r for r in read_metrics(run.metrics_file) if r.get("step", 0) <= step])

    def observe(self, record: Mapping[str, Any]) -> tuple[list[Alarm], int]:
        """Takes notice of a record: the new alarms, which are on file now, and how many hold."""
        new = self._rules.observe(record)
        for alarm in new:
            try:
                with open(self._run.alarms_file, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"time": time.time(), **asdict(alarm)}) + "\n")
            except OSError as error:
                log.warning("%s: cannot be written (%s)", self._run.alarms_file, error.strerror)
            if self._command is not None:
                self._tell(alarm, self._command)
        return new, len(self._rules.active)

    def _tell(self, alarm: Alarm, command: str) -> None:
        """Starts the command and goes on; what it says is in `on_alarm.log`."""
        self._running = [process for process in self._running if process.poll() is None]
        about = {"RUN": self._run.path, "STEP": alarm.step, "ALARM": alarm.alarm, "ADVICE": alarm.advice}
        variables = {f"MOKD_{name}": str(value) for name, value in about.items()}
        try:
            with open(self._run.path / "on_alarm.log", "ab") as output:
                process = subprocess.Popen(
                    command,
                    shell=True,
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a signal to this run is none to it
                )
        except OSError as error:
            log.warning("logging.on_alarm: cannot be started (%s)", error)
            return
        self._running.append(process)
