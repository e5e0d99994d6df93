"""What submitit runs in every rank."""

from __future__ import annotations

import faulthandler
import importlib
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import submitit

from data_pipeline.core.errors import UserError
from launcher.runs.permissions import require_private
from launcher.runs.records import Records
from mokd.distributed.stopping import StopRequest
from mokd.runs.exit_codes import EXIT_FAILED, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_USER, says_all
from mokd.runs.files import replace_json
from mokd.runs.run_directory import RunDirectory, StaleAttemptError

ENTRY = "mokd.training.entry:run"

# what a rank sees when another one has gone: true, but not the cause
_SECONDARY = re.compile(r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed out|DistBackend", re.IGNORECASE)


def run_rank(directory: str, entry: str = ENTRY) -> str:
    """Trains the run in `directory` in this rank and returns how it ended; what went wrong is left for the supervisor.

    Submitit's signal handlers are replaced first of all: they would requeue from inside the handler.
    """
    stop = StopRequest()
    stop.install()
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    faulthandler.enable()  # a rank that is ended for hanging says where it hung
    require_private(Path(directory))
    run = RunDirectory.open(Path(directory))
    attempt = int(os.environ["MOKD_ATTEMPT"])
    rank = _export_rank()
    for stream in (sys.stdout, sys.stderr):
        print(f"=== attempt {attempt}, rank {rank} on {_node()}", file=stream, flush=True)
    try:
        module, _, name = entry.partition(":")
        train = getattr(importlib.import_module(module), name)
        if stop.reason:
            # the others may not have been asked, but the supervisor ends them as soon as this rank has left
            print(f"asked to stop by {stop.reason} while starting", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_STOPPED)
        return str(train(run.path, stop=stop).state)
    except StaleAttemptError as error:
        print(f"leaving: {error}", file=sys.stderr, flush=True)
        _abandon()
        raise SystemExit(EXIT_SUPERSEDED) from None
    except UserError as error:
        _leave_word(run, attempt, rank, error)
        # submitit would print a traceback, which tells a user nothing more
        print(f"error: {error}", file=sys.stderr, flush=True)
        _abandon()
        raise SystemExit(EXIT_USER) from None
    except Exception as error:
        _leave_word(run, attempt, rank, error)
        if says_all(error):
            print(f"failed: {error}", file=sys.stderr, flush=True)
        _abandon()
        if says_all(error):
            raise SystemExit(EXIT_FAILED) from None
        raise


def _export_rank() -> int:
    """Tells this rank its place in torchrun's variables, the same under SLURM and submitit's local executor."""
    job = submitit.JobEnvironment()
    per_node = max(1, job.num_tasks // job.num_nodes)
    variables = {
        "RANK": job.global_rank,
        "WORLD_SIZE": job.num_tasks,
        "LOCAL_RANK": job.local_rank,
        "LOCAL_WORLD_SIZE": per_node,
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    return int(job.global_rank)


def _abandon() -> None:
    """Leaves the process group without waiting for ranks that are stuck in it."""
    if "torch.distributed" in sys.modules:
        from mokd.distributed.process_group import abandon

        abandon()


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _leave_word(run: RunDirectory, attempt: int, rank: int, error: Exception) -> None:
    message = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    record: dict[str, Any] = {
        "rank": rank,
        "node": _node(),
        "time": time.time(),
        "message": str(error) if isinstance(error, UserError) else message,
        "user_error": isinstance(error, UserError),
        "final": bool(getattr(error, "final", False)),
        "secondary": bool(_SECONDARY.search(message)),
    }
    folder = Records(run).rank_folder(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / f"rank-{rank}.json", record, durable=True)
