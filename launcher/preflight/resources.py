"""What a run asks the scheduler for: given by the user or the site, and for the rest what the cluster offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig, minutes
from launcher.slurm import client, container
from launcher.slurm.cluster_discovery import NodeKind, Partition, choose, count_gpus, discover
from mokd.config import RunConfig

WAYS_OUT = (
    "to train on CPUs set parallel.device=cpu or name a partition of CPUs with --partition; "
    "if there are GPUs that SLURM does not list, say how many with --gpus-per-node"
)
MEMORY_KEYS = {"mem", "mem_per_cpu", "mem_per_gpu", "mem-per-cpu", "mem-per-gpu"}


def settle(cluster: ClusterConfig, device: str) -> ClusterConfig:
    """The section with everything filled in that nobody has said, by asking SLURM. `device` is `parallel.device`.

    UserError when the run wants GPUs and the cluster has none for it. Where every resource is given, or SLURM
    is not on this machine, nobody is asked.
    """
    said = cluster.model_fields_set
    gres = count_gpus(str(cluster.sbatch.get("gres", "")))
    if "gpus_per_node" not in said and gres:
        cluster, said = cluster.model_copy(update={"gpus_per_node": gres}), said | {"gpus_per_node"}
    if device == "cpu" and cluster.gpus_per_node:
        raise UserError(f"parallel.device: cpu, but cluster.gpus_per_node asks for {cluster.gpus_per_node}; drop one")
    all_said = {"gpus_per_node", "cpus_per_task"} <= said and (cluster.gpus_per_node or device == "cpu")
    if all_said or not client.available():
        return cluster
    try:
        partitions = discover()
    except client.SchedulerError as error:
        hint = "give --gpus-per-node and --cpus-per-task, or name a --site that does"
        raise UserError(f"SLURM cannot be asked what nodes it has: {error}; {hint}") from None
    return fit(cluster, device, partitions)


def fit(cluster: ClusterConfig, device: str, partitions: Sequence[Partition]) -> ClusterConfig:
    """`settle` for known partitions."""
    said = cluster.model_fields_set
    wants = device != "cpu" and (cluster.gpus_per_node > 0 or "gpus_per_node" not in said)
    chosen = choose(partitions, cluster.partition, cluster.nodes, wants)
    if chosen is None and wants and cluster.gpus_per_node == 0 and cluster.partition is None:
        raise UserError(f"no partition of this cluster has GPUs ({_names(partitions)}); {WAYS_OUT}")
    if device != "cpu" and cluster.gpus_per_node == 0:
        _refuse_cpus(cluster, device, chosen, wants)
    if chosen is None:
        return cluster  # of a partition that sinfo does not show, sbatch itself has the last word
    node = chosen.kind(cluster.nodes, wants)
    update: dict[str, Any] = {}
    if wants and cluster.partition is None:
        update["partition"] = chosen.name
    if "gpus_per_node" not in said:
        update["gpus_per_node"] = node.gpus if wants else 0
    if "time" not in said and chosen.limit is not None and minutes(chosen.limit) < minutes(cluster.time):
        update["time"] = chosen.limit
    cluster = cluster.model_copy(update=update)
    return cluster.model_copy(update=_share(cluster, node))


def _refuse_cpus(cluster: ClusterConfig, device: str, chosen: Partition | None, wants: bool) -> None:
    """UserError unless the user has said that there are no GPUs to train on, by naming a partition without any."""
    if chosen is not None and chosen.gpus and not wants:
        raise UserError(
            f"cluster.gpus_per_node: 0, but partition {chosen.name} has GPUs; to train on CPUs set parallel.device=cpu"
        )
    if device == "cuda" and (chosen is None or not chosen.gpus):
        where = f"partition {chosen.name}" if chosen else f"partition {cluster.partition}, as far as sinfo shows it,"
        raise UserError(f"parallel.device: cuda, but {where} has no GPUs; {WAYS_OUT}")
    if chosen is not None and cluster.partition is None and not chosen.gpus:
        raise UserError(f"partition {chosen.name}, the default one, has no GPUs; {WAYS_OUT}")


def _share(cluster: ClusterConfig, node: NodeKind) -> dict[str, Any]:
    """Cores per rank and memory per node: the part of a node's that its GPUs (or ranks) are of the node's."""
    part = min(1.0, cluster.gpus_per_node / node.gpus) if cluster.gpus_per_node and node.gpus else 1.0
    update: dict[str, Any] = {}
    if "cpus_per_task" not in cluster.model_fields_set:
        update["cpus_per_task"] = max(1, int(node.cores * part) // cluster.ranks_per_node)
    elif not cluster.gpus_per_node:
        part = min(1.0, cluster.ranks_per_node * cluster.cpus_per_task / node.cores)
    if not MEMORY_KEYS & cluster.sbatch.keys() and node.memory_mb > 1:  # 1: memory is not described there
        # 0 means all of the node's
        update["sbatch"] = {**cluster.sbatch, "mem": 0 if part == 1.0 else f"{int(node.memory_mb * part)}M"}
    return update


def _names(partitions: Sequence[Partition]) -> str:
    return ", ".join(found.name for found in partitions) or "sinfo shows no partition"


def describe(config: RunConfig, cluster: ClusterConfig) -> str:
    """The job in one line, to be read before it is submitted."""
    unit = "GPU" if cluster.gpus_per_node == cluster.ranks_per_node else "rank"
    per_node = f"{cluster.gpus_per_node} GPUs" if cluster.gpus_per_node else f"{cluster.ranks_per_node} ranks on CPUs"
    where = f"partition {cluster.partition}" if cluster.partition else "default partition"
    images = config.optim.global_batch // cluster.world_size
    return (
        f"{cluster.nodes} nodes x {per_node} ({where}), {cluster.cpus_per_task} cores per {unit}, "
        f"{images} images per {unit} and step{container.describe(cluster.container)}"
    )


def propose_site(partition: str | None) -> dict[str, Any]:
    """A site profile for a partition: the named one, else the default one, else one with GPUs. UserError."""
    try:
        partitions = discover()
    except client.SchedulerError as error:
        raise UserError(f"SLURM cannot be asked what nodes it has: {error}") from None
    chosen = choose(partitions, partition, 1, gpus=True) or choose(partitions, partition, 1, gpus=False)
    if chosen is None:
        raise UserError(f"--partition: give one of {_names(partitions)}")
    cluster = fit(ClusterConfig(partition=chosen.name), "auto", partitions)
    keys = ("partition", "gpus_per_node", "cpus_per_task", "time", "sbatch")
    return {key: value for key, value in cluster.model_dump(mode="json", include=set(keys)).items() if value != {}}
