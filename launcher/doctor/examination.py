"""All checks in their order, and one node's report: `python -m launcher.doctor.examination` prints it as JSON."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.doctor import gpus, node, scheduler, software
from launcher.doctor.finding import Finding, Surroundings

CHECKS: tuple[Callable[[Surroundings], Finding], ...] = (
    software.python,
    software.torch,
    gpus.gpus,
    gpus.network,
    software.compiler,
    software.ffcv,
    software.native_libraries,
    software.affinity,
    scheduler.slurm,
    scheduler.munge,
    node.shared_memory,
    node.open_files,
    node.run_directory,
    node.data,
    node.clock,
)
# what asks SLURM's commands, which are outside of a job's container
OUTSIDE = (scheduler.slurm, scheduler.munge)


@dataclass(frozen=True)
class Report:
    """What was found on one node, by the name of the check."""

    node: str
    findings: dict[str, Finding]

    @property
    def healthy(self) -> bool:
        """Whether nothing stands in the way of a run."""
        return not any(finding.level == "problem" for finding in self.findings.values())

    def to_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        findings = [{"check": name, **asdict(finding)} for name, finding in self.findings.items()]
        return {"node": self.node, "ok": self.healthy, "findings": findings}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Report:
        """The report that `to_json` wrote."""
        return cls(record["node"], {finding.pop("check"): Finding(**finding) for finding in record["findings"]})


def examine(here: Surroundings, checks: Sequence[Callable[[Surroundings], Finding]] = CHECKS) -> Report:
    """Asks every check. One that breaks is a problem itself, and keeps no other from being asked."""
    findings = {}
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            findings[name] = check(here)
        except Exception as error:
            findings[name] = Finding("problem", f"the check itself failed: {type(error).__name__}: {error}")
    return Report(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), findings)


def arguments(here: Surroundings) -> list[str]:
    """The command line by which `main` looks where `here` looks."""
    data = [part for path in here.data for part in ("--data", str(path))]
    return ["--runs", str(here.runs), "--device", here.device, "--backend", here.backend, *data]


def main(given: Sequence[str]) -> int:
    """Examines this node."""
    parser = argparse.ArgumentParser(prog="python -m launcher.doctor.examination")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--container", action="store_true", help="leave out what is to be found outside of it")
    options = parser.parse_args(given)
    here = Surroundings(runs=options.runs, device=options.device, backend=options.backend, data=tuple(options.data))
    checks = [check for check in CHECKS if not (options.container and check in OUTSIDE)]
    print(json.dumps(examine(here, checks).to_json(), indent=0), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
