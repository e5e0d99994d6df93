"""The doctor on every node that a run would get: one short srun with the run's own resources."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig
from launcher.doctor.examination import Report, arguments
from launcher.doctor.finding import Surroundings
from launcher.slurm import container

MINUTES = 10
# what only sbatch understands
_BATCH_ONLY = {"requeue", "wrap", "array", "batch", "parsable", "test-only", "wait", "export-file"}
_CODE = Path(__file__).resolve().parents[2]


def srun_command(cluster: ClusterConfig, here: Surroundings) -> list[str]:
    """srun with the run's nodes, GPUs, cores and memory; one task on each node examines it."""
    flags = {
        "job-name": "mokd doctor",
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus_per_task * cluster.ranks_per_node,
        "time": MINUTES,
        **{key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "exclude")},
    }
    extra = {key.replace("_", "-"): value for key, value in cluster.sbatch.items()}
    if cluster.gpus_per_node and "gres" not in extra:
        flags["gpus-per-node"] = cluster.gpus_per_node
    flags |= {key: value for key, value in extra.items() if key not in _BATCH_ONLY and value is not False}
    options = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items() if value is not None]
    words = container.rank_words(cluster, _paths(here), _CODE)
    python = [*words.python, "-m", "launcher.doctor.examination", *arguments(here)]
    python += ["--container"] if cluster.container else []
    if not words.srun:  # the site's own lines first, as in the batch script; they are not for a container
        python = ["bash", "-c", "\n".join([*cluster.setup, f"exec {shlex.join(python)}"])]
    return ["srun", "--label", *options, *cluster.srun, *words.srun, *python]


def _paths(here: Surroundings) -> tuple[Path, ...]:
    """What a container must see of the host to be examined."""
    runs = here.runs.absolute()
    while not runs.exists():  # nothing has been launched yet
        runs = runs.parent
    return container.outermost([runs, _CODE, *(path.parent for path in here.data)])


def examine_allocation(cluster: ClusterConfig, here: Surroundings) -> list[Report]:
    """The reports of all nodes, by name. UserError when SLURM gives no nodes, or one of them does not answer."""
    environment = {
        **os.environ,
        **cluster.environment,
        "MOKD_GPUS_PER_NODE": str(cluster.gpus_per_node),
        "MOKD_RANKS_PER_NODE": str(cluster.ranks_per_node),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_CODE), os.environ.get("PYTHONPATH", "")])),
    }
    done = subprocess.run(srun_command(cluster, here), env=environment, stdout=subprocess.PIPE, text=True, check=False)
    reports = read_reports(done.stdout)
    if len(reports) != cluster.nodes:
        raise UserError(
            f"{len(reports)} of {cluster.nodes} nodes answered (srun left with status {done.returncode}; its lines "
            "above say why)"
        )
    return sorted(reports, key=lambda report: report.node)


def read_reports(text: str) -> list[Report]:
    """Reports out of srun's labelled lines, in which tasks are mixed."""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*(\d+): ?(.*)", line):
            lines.setdefault(match[1], []).append(match[2])
    reports = []
    for task in lines.values():
        # what a site's setup prints comes before
        body = "\n".join(task)
        begin = body.find('{\n"node"')
        with suppress(ValueError):
            reports.append(Report.from_json(json.loads(body[begin:])))
    return reports
