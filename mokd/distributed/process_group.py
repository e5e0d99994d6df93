"""Ranks: who am I, who are the others. From torchrun, SLURM or submitit, or a single process."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from data_pipeline.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master: str = "127.0.0.1"
    port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0


def ranks_from_environment(environ: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that torchrun, SLURM (with or without submitit) or nobody has set up; UserError when contradictory."""
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return Ranks(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", "0")),
                local_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
                master=environ.get("MASTER_ADDR", "127.0.0.1"),
                port=int(environ.get("MASTER_PORT", "29500")),
            )
        # SLURM_PROCID alone is not enough: a batch script or `salloc` shell has SLURM variables, but is no task
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
            job = int(environ.get("SLURM_JOB_ID", "0"))
            return Ranks(
                rank=int(environ["SLURM_PROCID"]),
                world_size=int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))),
                local_rank=int(environ["SLURM_LOCALID"]),
                local_size=_tasks_on_node(environ),
                master=environ.get("MASTER_ADDR", first_host(nodes)),
                # every task derives the same port; two jobs on one node get different ones
                port=int(environ.get("MASTER_PORT", str(20000 + job % 20000))),
            )
    except (KeyError, ValueError) as error:
        raise UserError(f"the environment's rank variables cannot be used: {error}") from None
    return Ranks()


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list.

    >>> first_host("gpu[07-09,12],login"), first_host("n1,n2")
    ('gpu07', 'n1')
    """
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodelist)
    if not match:
        raise ValueError(f"node list '{nodelist}'")
    prefix, ranges, suffix = match.groups()
    return prefix + (re.split(r"[-,]", ranges)[0] if ranges else "") + (suffix or "")


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    # "2(x3),1": two tasks on each of three nodes, then one; the entry of this node counts
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def join(ranks: Ranks, device: torch.device, timeout_seconds: float) -> None:
    """Joins the process group (NCCL on GPUs, gloo on CPUs); nothing to do for a single process."""
    if ranks.world_size == 1 or dist.is_initialized():
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{ranks.master}:{ranks.port}",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if device.type == "cuda" else None,
    )


def set_timeout(timeout_seconds: float) -> None:
    """From now on a collective may take so long."""
    if dist.is_initialized():
        # the public name is newer than the oldest torch that is supported
        change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        change(timedelta(seconds=timeout_seconds))


def leave() -> None:
    """Leaves the process group, if any, when all ranks do: NCCL finishes what is under way."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon() -> None:
    """Leaves the process group, if any, after a failure of this rank alone: nothing under way is waited for.

    To be called after the rank has left its word: from here on the others see a closed connection.
    """
    if not dist.is_initialized():
        return
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    # gloo has nothing to abort; without an abort, leaving the process closes NCCL's connections too
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()
    elif abort is not None:
        abort()


def use_own_cores(threads: int | None) -> None:
    """Sets torch's threads in this rank: `threads`, or as many as its share of the cores that it may run on.

    After `join`: ranks of a machine tell each other which cores they have.
    """
    torch.set_num_threads(threads or core_share(*_affinities()))


def core_share(mine: Collection[int], beside: Sequence[Collection[int]]) -> int:
    """Whole cores of `mine` for one rank, where the ranks of its machine, itself among them, have the cores `beside`.

    Ranks that SLURM has bound have cores of their own, and nothing to divide.
    """
    shares = (Fraction(1, max(sum(core in cores for cores in beside), 1)) for core in mine)
    return max(1, int(sum(shares, Fraction(0))))


def _affinities() -> tuple[set[int], list[set[int]]]:
    host, mine = socket.gethostname(), os.sched_getaffinity(0)
    return mine, [cores for other, cores in gather_objects((host, mine)) if other == host]


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks in place and returns it; itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The largest over all ranks, in place; itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank; a list of one in a single process."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Every rank's tensor, by rank: `[world size, ...]`; all of one shape. A leading 1 in a single process."""
    if not dist.is_initialized():
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())  # gloo wants the parts one after the other
    return gathered.unflatten(0, (-1, tensor.shape[0]))


def broadcast_from_main(value: T) -> T:
    """The first rank's value on every rank; itself in a single process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def decided_by_main(decide: Callable[[], T]) -> T:
    """What the first rank has found, on every rank; the UserError that it has met is every rank's too."""
    found: T | None = None
    problem: str | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = decide()
        except UserError as error:
            problem = str(error)
    found, problem = broadcast_from_main((found, problem))
    if problem is not None:
        raise UserError(problem)
    return cast(T, found)


def barrier() -> None:
    """Waits for all ranks; nothing in a single process."""
    if dist.is_initialized():
        dist.barrier()
