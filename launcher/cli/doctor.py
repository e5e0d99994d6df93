"""`mokd doctor`, and the same on every node that a run would get: `mokd launch CONFIG --check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.console import AsJson, Root, find_config, print_json, say
from launcher.config import ClusterConfig
from launcher.doctor.finding import Surroundings
from mokd.config import RunConfig, load_config

if TYPE_CHECKING:
    from launcher.doctor.examination import Report

UNHEALTHY = 2


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: mokd doctor vit_s_resnet50.yaml --json")(doctor)


def doctor(
    config: Annotated[str | None, typer.Argument(help="a configuration, to look at its data and device too")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value")] = None,
    root: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Look for what would keep a run from working on this machine, and say how to mend it.

    Exit status: 0 when nothing stands in the way (there may be warnings), 2 when there is a problem.
    """
    from launcher.doctor.examination import examine

    here = surroundings(load_config(find_config(config), overrides or []), root) if config else Surroundings(runs=root)
    report = examine(here)
    if as_json:
        print_json(report.to_json())
    else:
        _show([report], every=True)
    raise typer.Exit(0 if report.healthy else UNHEALTHY)


def surroundings(config: RunConfig, root: Path) -> Surroundings:
    """Where the doctor looks for a run of this configuration."""
    paths = (config.data.train, config.evaluation.train, config.evaluation.test)
    data = tuple(dict.fromkeys(path.absolute() for path in paths if path is not None))
    return Surroundings(runs=root.absolute(), data=data, device=config.parallel.device, backend=config.data.backend)


def check_nodes(config: RunConfig, cluster: ClusterConfig, root: Path, *, as_json: bool) -> int:
    """Examines every node that the run would get; the exit status."""
    from launcher.doctor.allocation import examine_allocation
    from launcher.preflight.resources import describe

    say(describe(config, cluster))
    reports = examine_allocation(cluster, surroundings(config, root))
    healthy = all(report.healthy for report in reports)
    if as_json:
        print_json({"ok": healthy, "nodes": [report.to_json() for report in reports]})
    else:
        _show(reports, every=False)
    return 0 if healthy else UNHEALTHY


def _show(reports: Sequence[Report], every: bool) -> None:
    """Each node's findings; of several nodes only what is not well."""
    for report in reports:
        counts = Counter(finding.level for finding in report.findings.values())
        print(
            f"{report.node}: {counts['ok']} ok, {counts['warning']} with a warning, {counts['problem']} with a problem"
        )
        for check, finding in report.findings.items():
            if every or finding.level != "ok":
                print(f"  {finding.level:8} {check}: {finding.message}")
                if finding.mend:
                    print(f"           mend with: {finding.mend}")
