"""What a benchmark ran on: processor, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def describe(packages: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """The machine and the versions of `packages`; whether the folders `sources` of the checkout have changes."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_at_end": os.getloadavg(),
        "versions": versions,
        "commit": git(["git", "rev-parse", "HEAD"]).stdout.strip(),
        "uncommitted_changes": bool(git(["git", "status", "--porcelain", "--", *sources]).stdout.strip()),
        "date": datetime.now(UTC).date().isoformat(),
    }
