"""What a one-machine cluster looks like: its options and the files that the daemons read."""

from __future__ import annotations

import getpass
import socket
from dataclasses import dataclass
from pathlib import Path

CPUS_PER_NODE = 16  # a fiction that lets several small jobs share the machine's few cores


@dataclass(frozen=True)
class Options:
    """The knobs that a test or a curious developer may want to turn."""

    nodes: int = 4
    gpus: int = 4  # of each node: links to /dev/null that SLURM grants like real ones; nothing computes there
    send_user_signal: bool = False  # preemption sends the job's own --signal instead of SIGTERM
    grace_seconds: int = 30  # between that signal and the requeue
    kill_wait_seconds: int = 30  # between SIGTERM and SIGKILL
    slurmd_timeout_seconds: int = 15  # silence after which a node counts as dead
    min_job_age_seconds: int = 300  # how long the controller remembers a finished job
    port: int = 17817  # the controller's; the nodes take the following ones

    def node_names(self) -> list[str]:
        """The nodes, `n1` to `nN`."""
        return [f"n{index}" for index in range(1, self.nodes + 1)]


def slurm_conf(state: Path, options: Options) -> str:
    """The text of slurm.conf for a cluster whose files all lie under `state`."""
    user, host = getpass.getuser(), socket.gethostname()
    lines = [
        "ClusterName=laptop",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={options.port}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"StateSaveLocation={state}/ctld",
        f"SlurmdSpoolDir={state}/spool-%n",
        f"SlurmctldPidFile={state}/slurmctld.pid",
        f"SlurmdPidFile={state}/slurmd-%n.pid",
        f"SlurmctldLogFile={state}/log/slurmctld.log",
        f"SlurmdLogFile={state}/log/slurmd-%n.log",
        *(["SlurmctldParameters=preempt_send_user_signal"] if options.send_user_signal else []),
        # a requeued job waits cred_expire + 1 seconds; the default is two minutes
        f"AuthType=auth/munge\nAuthInfo=socket={state}/munge/socket,cred_expire=5",
        "CredType=cred/munge",
        "MpiDefault=none",
        *(["GresTypes=gpu"] if options.gpus else []),
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,defer_batch=0",
        "PriorityType=priority/basic",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        "JobCompType=jobcomp/none",
        f"KillWait={options.kill_wait_seconds}",
        f"SlurmdTimeout={options.slurmd_timeout_seconds}",
        f"MinJobAge={options.min_job_age_seconds}",
        "SlurmctldTimeout=30",
        "MessageTimeout=10",
        "InactiveLimit=0",
        "CompleteWait=0",
        "ReturnToService=2",
        "JobRequeue=1",
    ]
    gres = f"Gres=gpu:{options.gpus} " if options.gpus else ""
    for index, name in enumerate(options.node_names(), start=1):
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={options.port + index} "
            f"CPUs={CPUS_PER_NODE} RealMemory=2000 {gres}State=UNKNOWN"
        )
    shared = f"Nodes={','.join(options.node_names())} MaxTime=INFINITE State=UP"
    lines += [
        f"PartitionName=low {shared} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={options.grace_seconds}",
        f"PartitionName=high {shared} PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def gpu_files(state: Path, options: Options) -> dict[str, list[Path]]:
    """What stands in for the device files of each node's GPUs."""
    return {name: [state / "gpus" / name / f"gpu{i}" for i in range(options.gpus)] for name in options.node_names()}


def gres_conf(state: Path, options: Options) -> str:
    """The text of gres.conf: which files are whose GPUs."""
    files = gpu_files(state, options)
    return "".join(f"NodeName={node} Name=gpu File={path}\n" for node, paths in files.items() for path in paths)
