"""What a check is asked with, and what it answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What a check answers; `mend` is the command or the line of a site profile that mends it."""

    level: Level
    message: str
    mend: str | None = None


@dataclass(frozen=True)
class Surroundings:
    """Where a check looks. The defaults are this process's own; another place is for a run's paths, and for tests."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    runs: Path = Path("runs")  # where run directories lie or will lie
    data: tuple[Path, ...] = ()
    device: str = "auto"  # parallel.device
    backend: str = "ffcv"  # data.backend
    shm: Path = Path("/dev/shm")
    root: Path = Path("/")  # of /dev and /proc
    packages: tuple[Path, ...] | None = None  # with a native library each; None: the installed ones

    @property
    def promised(self) -> int | None:
        """GPUs of this node that the launcher asked for; None where nobody has."""
        text = self.environ.get("MOKD_GPUS_PER_NODE", "")
        return int(text) if text.isdigit() else None

    @property
    def wants_gpus(self) -> bool:
        """Whether a run here would count on GPUs."""
        return self.device == "cuda" or (self.device == "auto" and bool(self.promised))

    def run(self, *command: str, seconds: float = 60.0, given: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command in this environment; one that is missing or takes too long has status 127 or 124."""
        try:
            return subprocess.run(
                command,
                env=dict(self.environ),
                input=given,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except (FileNotFoundError, PermissionError) as error:
            return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {error.strerror}")
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"{command[0]}: no answer in {seconds:.0f} s")

    def python(self, program: str) -> subprocess.CompletedProcess[str]:
        """Runs a short program in a fresh interpreter like this one: what it breaks, and what it loads, is its own."""
        return self.run(sys.executable, "-c", program, seconds=120.0)


def last_line(text: str) -> str:
    """The line of an error's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
