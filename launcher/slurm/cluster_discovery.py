"""What the cluster offers, asked of the scheduler: partitions, and in each the kinds of nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.slurm.client import SchedulerError, ask

# partition with * for the default, up or down, time limit, GRES, CPUs, memory in MB, nodes
FIELDS = "%P|%a|%l|%G|%c|%m|%D"
_GPU = re.compile(r"(?:^|,)gpu(?::(?P<kind>[^:,(]*[^:,(\d][^:,(]*))?(?::(?P<count>\d+))?")


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike. `cores` are CPUs as SLURM counts them."""

    nodes: int
    gpus: int
    cores: int
    memory_mb: int


@dataclass(frozen=True)
class Partition:
    """A partition that is up. `limit` is its longest job, in SLURM's own writing; None: unlimited."""

    name: str
    default: bool
    limit: str | None
    kinds: tuple[NodeKind, ...]

    @property
    def gpus(self) -> int:
        """GPUs of the whole partition."""
        return sum(kind.nodes * kind.gpus for kind in self.kinds)

    def kind(self, nodes: int, gpus: bool) -> NodeKind:
        """The nodes to ask for: with the most GPUs (or cores), of those that there are enough of, if any."""
        enough = [kind for kind in self.kinds if kind.nodes >= nodes] or list(self.kinds)
        return max(enough, key=lambda kind: (kind.gpus if gpus else 0, kind.cores, kind.memory_mb))


def discover() -> list[Partition]:
    """The partitions that this user sees; SchedulerError when the controller does not answer."""
    return parse(ask("sinfo", "--noheader", "--exact", "-o", FIELDS))


def parse(text: str) -> list[Partition]:
    """Partitions out of sinfo's lines of `FIELDS`, in sinfo's order."""
    kinds: dict[tuple[str, str], list[NodeKind]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != len(FIELDS.split("|")):
            raise SchedulerError(f"sinfo: not understood: {line}")
        name, available, limit, gres, cores, memory, nodes = fields
        found = kinds.setdefault((name, limit), [])
        if available == "up" and int(nodes):
            # a "+" follows what is only the least among unlike nodes
            found.append(NodeKind(int(nodes), count_gpus(gres), int(cores.rstrip("+")), int(memory.rstrip("+"))))
    return [
        Partition(name.rstrip("*"), name.endswith("*"), None if limit in ("infinite", "n/a") else limit, tuple(found))
        for (name, limit), found in kinds.items()
        if found
    ]


def count_gpus(gres: str) -> int:
    """GPUs in a GRES text.

    >>> [count_gpus(text) for text in ("gpu:4", "gpu:a100:8(S:0-1),nvme:1", "gpu:1,gpu:h100:2", "(null)")]
    [4, 8, 3, 0]
    """
    bare = re.sub(r"\([^)]*\)", "", gres)
    return sum(int(match["count"] or 1) for match in _GPU.finditer(bare))


def choose(partitions: Sequence[Partition], named: str | None, nodes: int, gpus: bool) -> Partition | None:
    """The partition to use: the named one, else the default, else, when GPUs are wanted, one that has them.

    None when the named one is not there (sbatch says so better), or none has GPUs though they are wanted.
    """
    if named is not None:
        # sbatch takes several names, and uses whichever starts first
        return next((found for found in partitions if found.name == named.split(",")[0]), None)
    usual = next((found for found in partitions if found.default), None)
    if not gpus:
        return usual
    with_gpus = [found for found in partitions if found.gpus]
    if usual in with_gpus:
        return usual
    return max(with_gpus, key=lambda found: (found.kind(nodes, True).nodes >= nodes, found.gpus), default=None)
