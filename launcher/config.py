"""The section `cluster:` of a configuration, and site profiles that fill it in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import NonNegativeInt, PositiveInt, StrictModel

# what the launcher sets itself: given again as an extra parameter they would contradict it
OWN_PARAMETERS = frozenset(
    {
        *("account", "array", "chdir", "constraint", "cpus-per-task", "error", "exclude", "gpus-per-node", "job-name"),
        *("nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "no-requeue"),
        *("signal", "time", "wrap"),
    }
)
DEFAULT_SITE = "default"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class ContainerConfig(StrictModel):
    """The image in which a job's ranks run; docs/containers.md."""

    image: Annotated[str, Field(description="a file or folder that every node sees; for pyxis also IMAGE:TAG")]
    runtime: Annotated[
        Literal["apptainer", "singularity", "pyxis"], Field(description="what starts containers on the nodes")
    ] = "apptainer"
    python: Annotated[str, Field(description="the interpreter in the image")] = "python3"
    mounts: Annotated[
        tuple[str, ...], Field(description="SOURCE[:TARGET[:FLAGS]] besides run, code and data, which are always there")
    ] = ()
    options: Annotated[
        tuple[str, ...], Field(description="further arguments of `apptainer exec`, or of srun for pyxis")
    ] = ()

    @field_validator("image", "python")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip() or _CONTROL.search(value) or value.startswith("-"):
            raise ValueError("a text in one line, not empty, without a dash in front")
        return value

    @field_validator("mounts")
    @classmethod
    def _mounts(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            parts = mount.split(":")
            if not all(part.startswith("/") for part in parts[:2]) or len(parts) > 3 or "," in mount:
                raise ValueError(f"'{mount}': SOURCE, SOURCE:TARGET or SOURCE:TARGET:FLAGS, absolute, without a comma")
            if _CONTROL.search(mount):
                raise ValueError(f"{mount!r}: one line per entry")
        return mounts

    @field_validator("options")
    @classmethod
    def _options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.strip() or _CONTROL.search(option):
                raise ValueError("one argument per entry, in one line")
            if option in ("--cleanenv", "-e", "--containall", "-C"):
                raise ValueError(f"'{option}' takes away the variables by which ranks find each other; use --contain")
        return options


class ClusterConfig(StrictModel):
    """Where and how a run is scheduled."""

    site: Annotated[str | None, Field(description="a profile in ~/.config/mokd/sites/")] = None
    nodes: Annotated[PositiveInt, Field(description="of a job")] = 1
    gpus_per_node: Annotated[NonNegativeInt, Field(description="default: all that SLURM says a node has")] = 0
    tasks_per_node: Annotated[PositiveInt | None, Field(description="default: one per GPU, or one")] = None
    cpus_per_task: Annotated[PositiveInt, Field(description="default: a rank's share of the node's")] = 1
    partition: Annotated[str | None, Field(description="default: SLURM's, or one with GPUs")] = None
    account: Annotated[str | None, Field(description="as sbatch has it")] = None
    qos: Annotated[str | None, Field(description="as sbatch has it")] = None
    time: Annotated[str, Field(description="limit of one slice: minutes, H:MM:SS or D-HH:MM:SS")] = "24:00:00"
    constraint: Annotated[str | None, Field(description="features of nodes, as sbatch has it")] = None
    exclude: Annotated[str | None, Field(description="nodes to stay away from")] = None
    sbatch: Annotated[dict[str, str | int | bool], Field(description="any further sbatch parameter")] = {}
    srun: Annotated[tuple[str, ...], Field(description="further arguments of srun")] = ()
    setup: Annotated[tuple[str, ...], Field(description="shell lines run on the first node before training")] = ()
    environment: Annotated[dict[str, str], Field(description="variables of the ranks")] = {}
    container: Annotated[ContainerConfig | None, Field(description="an image in which the ranks run")] = None
    array_parallelism: Annotated[PositiveInt, Field(description="runs of a sweep at one time")] = 16
    signal_lead_seconds: Annotated[PositiveInt, Field(description="warning before the time limit")] = 120
    max_requeues: Annotated[NonNegativeInt, Field(description="after which a run stops")] = 1000
    max_restarts_without_progress: Annotated[
        NonNegativeInt, Field(description="failures at one checkpoint after which a run stops")
    ] = 3
    startup_timeout_seconds: Annotated[PositiveInt, Field(description="from start to the first step")] = 1800
    compile_timeout_seconds: Annotated[PositiveInt, Field(description="a first step that compiles")] = 3600
    hang_timeout_seconds: Annotated[PositiveInt, Field(description="without a step while training")] = 900
    evaluate_timeout_seconds: Annotated[PositiveInt, Field(description="without a batch in an evaluation")] = 3600
    save_timeout_seconds: Annotated[PositiveInt, Field(description="a save that training waits for")] = 1800
    kill_after_seconds: Annotated[PositiveInt, Field(description="for the others to leave when a rank has died")] = 8

    @field_validator("partition", "account", "qos", "constraint", "exclude", "time")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and (_CONTROL.search(value) or not value):
            raise ValueError("a text in one line, not empty")
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @field_validator("time")
    @classmethod
    def _limit(cls, value: str) -> str:
        if minutes(value) < 1:
            raise ValueError("at least one minute")
        return value

    @field_validator("sbatch")
    @classmethod
    def _extra(cls, extra: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for key, value in extra.items():
            name = key.replace("_", "-")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(f"'{key}': the long name of an sbatch parameter, without dashes in front")
            if name in OWN_PARAMETERS:
                raise ValueError(f"'{key}': set by the launcher; use its own key of the section cluster")
            if _CONTROL.search(str(value)):
                raise ValueError(f"'{key}': a value in one line")
        return extra

    @field_validator("srun", "setup")
    @classmethod
    def _lines(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            if _CONTROL.search(line.replace("\t", " ")):
                raise ValueError("one line per entry")
        return lines

    @field_validator("environment")
    @classmethod
    def _variables(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"'{name}': not the name of an environment variable")
        return variables

    @model_validator(mode="after")
    def _lead_fits(self) -> ClusterConfig:
        if self.signal_lead_seconds >= 60 * minutes(self.time):
            raise ValueError(
                f"signal_lead_seconds {self.signal_lead_seconds}: not shorter than the time limit {self.time}"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.ranks_per_node


def minutes(limit: str) -> int:
    """A SLURM time limit in minutes, rounded up.

    >>> minutes("90"), minutes("1:30:00"), minutes("2-0"), minutes("1-02:30"), minutes("10:30")
    (90, 90, 2880, 1590, 11)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise ValueError("minutes, MM:SS, H:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    if days is None and len(given) < 3:  # minutes come first
        given.insert(0, 0)
    hours, minute, second = [*given, 0, 0][:3]
    seconds = (int(days or 0) * 24 + hours) * 3600 + minute * 60 + second
    return -(-seconds // 60)


def sites_folder() -> Path:
    """Where this user's site profiles lie."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mokd" / "sites"


def load_cluster(section: Mapping[str, Any], flags: Mapping[str, Any], source: str) -> ClusterConfig:
    """The section with the site's profile below it and the command line's flags on top.

    Where no site is named, the profile `default` is used if there is one; `site: null` declines it.
    Mappings (`sbatch`, `environment`) are merged key by key; everything else is replaced.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    usual = DEFAULT_SITE if (sites_folder() / f"{DEFAULT_SITE}.yaml").is_file() else None
    site = given.get("site", section.get("site", usual))
    profile: Mapping[str, Any] = {}
    if site is not None:
        path = site_file(str(site))
        if not path.is_file():
            raise UserError(f"cluster.site '{site}': no profile {path}; {_known_sites()}")
        profile = schema.read_yaml(path)
        schema.validate(ClusterConfig, dict(profile), str(path))
        source = f"{source} with site {site}"
    merged: dict[str, Any] = {}
    for layer in (profile, section, given):
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    return schema.validate(ClusterConfig, merged, f"{source}: cluster")


def site_file(site: str) -> Path:
    """Where a profile lies, or would lie; UserError for a name that is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", site):
        raise UserError(f"cluster.site '{site}': the name of a profile, letters, digits, '.', '_' and '-'")
    return sites_folder() / f"{site}.yaml"


def site_names() -> list[str]:
    """The profiles of this user."""
    return sorted(found.stem for found in sites_folder().glob("*.yaml"))


def _known_sites() -> str:
    known = site_names()
    return f"there are: {', '.join(known)}" if known else "write one with: mokd site init --name NAME"
