"""Which device a rank computes on, and why it has no GPU when it should have one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from data_pipeline.core.errors import UserError
from mokd.distributed.process_group import Ranks

PROMISE = "MOKD_GPUS_PER_NODE"  # set by the launcher: what it asked the scheduler for
WAYS_OUT = "to compute on CPUs set parallel.device=cpu"
ROOT = Path("/")


def promised_gpus(ranks: Ranks, environ: Mapping[str, str] = os.environ) -> int | None:
    """GPUs of this node that the run counts on; None where nobody has said, and whatever there is will do.

    Under SLURM without the launcher it is one for each rank: nobody asks a cluster for nodes to use CPUs unawares.
    """
    if PROMISE in environ:
        try:
            return int(environ[PROMISE])
        except ValueError:
            raise UserError(f"{PROMISE}: '{environ[PROMISE]}' is not a number") from None
    return ranks.local_size if "SLURM_STEP_ID" in environ else None


def pick_device(ranks: Ranks, device: str = "auto", promised: int | None = None) -> torch.device:
    """This rank's accelerator, or the CPU.

    `device` is `parallel.device`; `promised` counts the GPUs that this node was to have, None where nobody has said.
    UserError with the cause when a GPU is wanted and there is none for this rank.
    """
    if device == "cpu" or (device == "auto" and promised == 0):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if device == "auto" and promised is None:
            return torch.device("cpu")
        number = "1 GPU was" if promised == 1 else f"{promised} GPUs were"
        wanted = f"{number} promised here" if promised else "a GPU is wanted"
        raise UserError(f"{wanted}, but rank {ranks.rank} can use none: {why_no_gpu()}; {WAYS_OUT}")
    visible = torch.cuda.device_count()
    index = ranks.local_rank
    if visible < ranks.local_size:
        # SLURM may have bound each rank to one GPU of its own; then the node has as many as ranks
        if visible > 1 or (promised or 0) < ranks.local_size:
            raise UserError(
                f"{ranks.local_size} ranks on this node, but rank {ranks.rank} sees {visible} GPUs: one rank a GPU, "
                "by cluster.tasks_per_node or --nproc, or ask for more with cluster.gpus_per_node"
            )
        index = 0
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return chosen


def why_no_gpu(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> str:
    """Why torch can use no GPU here, in words that say what to mend. `root` is where `/dev` and `/proc` lie."""
    built_for = torch.version.cuda
    if built_for is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build (https://pytorch.org)"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    forgotten = "gave this step no GPU (--gpus-per-node or --gres forgotten?)"
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES is empty: the scheduler {forgotten}"
    given = any(environ.get(name) for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"))
    if "SLURM_STEP_ID" in environ and visible is None and not given:
        return f"SLURM {forgotten}"
    if not (root / "proc/driver/nvidia/version").exists() and not list((root / "dev").glob("nvidia[0-9]*")):
        return "there is no NVIDIA driver on this node (no /proc/driver/nvidia, no /dev/nvidia0)"
    driver = driver_cuda()
    if driver is None:
        return "libcuda.so.1 cannot be loaded: the driver's library is missing from this node or container"
    if driver < tuple(int(part) for part in built_for.split("."))[:1]:
        text = ".".join(map(str, driver))
        return f"the driver knows CUDA {text}, torch needs {built_for}: update it, or install torch for CUDA {text}"
    try:
        torch.cuda.init()
    except Exception as error:  # whatever CUDA says is the best there is
        return " ".join(str(error).split())
    return "the driver shows no device (nvidia-smi tells more)"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver knows; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
