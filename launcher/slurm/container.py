"""The image in which a job's ranks run: what they see of the host, and the words that start Python there.

The batch script and its supervisor stay outside, where SLURM's commands are. A job that is launched from inside of an
Apptainer container has its supervisor in that container too, for there may be no MOKD on the host (docs/containers.md).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig, ContainerConfig
from launcher.slurm import client
from mokd.config import RunConfig

# image formats that are files; anything else that is no path is the name of an image in a registry
_FILES = (".sif", ".sqsh", ".squashfs", ".img")
# those that say in variables where a process is
_LEAVING_WORD: tuple[Literal["apptainer", "singularity"], ...] = ("apptainer", "singularity")
# the search path of the batch script, kept for the ranks of a supervisor that is in a container
HOST_PATH = "MOKD_HOST_PATH"
_GPU_OPTIONS = {"--nv", "--nvccli", "--rocm"}


@dataclass(frozen=True)
class Surrounding:
    """The Apptainer or Singularity container that this process runs in. binds: what is bound into it."""

    runtime: Literal["apptainer", "singularity"]
    image: str
    binds: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """What starts Python: arguments of srun, and the beginning of the command."""

    srun: tuple[str, ...]
    python: tuple[str, ...]


def surrounding(environ: Mapping[str, str] = os.environ) -> Surrounding | None:
    """The container around this process, by the variables that it sets."""
    for runtime in _LEAVING_WORD:
        if image := environ.get(f"{runtime.upper()}_CONTAINER"):
            binds = environ.get(f"{runtime.upper()}_BIND", "")
            return Surrounding(runtime, image, tuple(filter(None, binds.split(","))))
    return None


def settle(cluster: ClusterConfig, local: bool) -> ClusterConfig:
    """The section with the image's path absolute and, inside of a container, that one's image where none is named.

    UserError for an image that is not there, and for a local job, which runs where it is started.
    """
    around, container = surrounding(), cluster.container
    if local:
        if container is not None and around is None:
            raise UserError(
                "--local runs the job on this machine as it is, not in cluster.container; call mokd inside of the "
                "image, or give cluster.container=null"
            )
        return cluster.model_copy(update={"container": None})
    if container is None:
        if around is None:
            return cluster
        container = ContainerConfig(image=around.image, runtime=around.runtime, python=sys.executable)
    elif around is None or container.image != around.image:
        container = container.model_copy(update={"image": _image(container)})
    return cluster.model_copy(update={"container": container})


def check(cluster: ClusterConfig, paths: Sequence[Path]) -> list[str]:
    """Warnings about a container; UserError where it cannot work with this SLURM, or cannot be given these paths."""
    container = cluster.container
    if container is None:
        return []
    _binds(container, paths)
    if container.runtime != "pyxis":
        missing = shutil.which(container.runtime) is None and surrounding() is None
        found = f"{container.runtime} is not on this machine; the nodes must have it, or cluster.setup must bring it"
        return [f"cluster.container: {found}"] if missing else []
    try:
        options = client.ask("srun", "--help")
    except client.SchedulerError:
        return []  # without SLURM nothing is submitted either
    if "--container-image" not in options:
        raise UserError(
            "cluster.container.runtime: pyxis, but this SLURM's srun has no --container-image; use apptainer"
        )
    return []


def run_paths(config: RunConfig, *own: Path) -> tuple[Path, ...]:
    """Folders that the ranks of a run read and write: its own, and those of every path in its configuration."""
    found = [*own]
    for path in _paths(config):
        # a beton has its manifest beside it, and may be a link to one elsewhere
        for file in (path.absolute(), path.resolve()):
            folder = file if file.is_dir() or file.parent == Path("/") else file.parent
            found += [folder] if folder.exists() else []
    return outermost(found)


def outermost(paths: Sequence[Path]) -> tuple[Path, ...]:
    """`paths` without those that lie below others of them."""
    kept: list[Path] = []
    for path in sorted(dict.fromkeys(paths), key=lambda path: len(path.parts)):
        if not any(path.is_relative_to(above) for above in kept):
            kept.append(path)
    return tuple(kept)


def rank_words(cluster: ClusterConfig, paths: Sequence[Path], code: Path) -> Words:
    """How srun starts Python in the ranks."""
    container = cluster.container
    if container is None:
        return Words((), (sys.executable, "-u"))
    binds = _binds(container, paths)
    path = os.pathsep.join(filter(None, [str(code), cluster.environment.get("PYTHONPATH")]))
    variables = {**cluster.environment, "PYTHONPATH": path}
    python = _python(container.python, variables)
    if container.runtime == "pyxis":
        mounts = f"--container-mounts={','.join(binds)}"
        return Words((f"--container-image={container.image}", mounts, *container.options), python)
    given = [*container.options]
    if cluster.gpus_per_node and not _GPU_OPTIONS & {*given}:
        given.insert(0, "--nv")
    return Words((), (*_exec(container.runtime, container.image, binds, given), *python))


def batch_words(paths: Sequence[Path], code: Path) -> tuple[str, ...]:
    """How the batch script starts Python for the supervisor: on the host, or in the container it is launched from."""
    around = surrounding()
    if around is None:
        return (sys.executable, "-u")
    binds = dict.fromkeys([*around.binds, *(f"{path}:{path}" for path in paths)])
    words = _exec(around.runtime, around.image, [*binds], [])
    return (*words, *_python(sys.executable, {"PYTHONPATH": str(code)}))


def describe(container: ContainerConfig | None) -> str:
    """The end of the line that tells of a job."""
    return f", in {container.image} ({container.runtime})" if container else ""


def _image(container: ContainerConfig) -> str:
    """The image as the nodes are told it; UserError for a file that is not there, or what cannot be a file."""
    image, key = container.image, "cluster.container.image"
    path = Path(image).expanduser()
    if container.runtime == "pyxis" and not image.startswith(("/", ".", "~")) and path.suffix not in _FILES:
        return image  # every node fetches it by name
    if re.match(r"[a-z-]+://", image):
        raise UserError(f"{key} '{image}': every rank would fetch it; once: {container.runtime} pull mokd.sif {image}")
    if not path.exists():
        hint = "docs/containers.md tells how to make one"
        raise UserError(f"{key}: {path.absolute()}: no such image; {hint}")
    return str(path.absolute())


def _binds(container: ContainerConfig, paths: Sequence[Path]) -> list[str]:
    around = surrounding()
    for path in paths:
        if any(mark in str(path) for mark in ":,"):
            raise UserError(f"{path}: a path with ':' or ',' cannot be bound into a container")
    inherited = around.binds if around else ()
    return list(dict.fromkeys([*inherited, *(f"{path}:{path}" for path in paths), *container.mounts]))


def _exec(runtime: str, image: str, binds: Sequence[str], options: Sequence[str]) -> tuple[str, ...]:
    return (runtime, "exec", *(word for bind in binds for word in ("--bind", bind)), *options, image)


def _python(python: str, variables: Mapping[str, str]) -> tuple[str, ...]:
    """Python with variables that no image replaces by its own, and with no packages of the host's user."""
    own = {**variables, "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    return ("env", "-u", "PYTHONHOME", *(f"{name}={value}" for name, value in own.items()), python, "-u")


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for _, part in value:
            yield from _paths(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _paths(part)
