"""The entry of every rank: `python -m mokd.training.entry RUN_DIRECTORY`, under torchrun, SLURM, submitit or alone."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from data_pipeline.core.imports import resting_collector

# OpenMP reads this when torch brings it. Threads that spin while they wait for one another keep the loader's threads,
# and other programs, from the cores that they share, and wait the longer for it: 8 ms became 106 at times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

with resting_collector():
    import torch.distributed as dist

    from data_pipeline.core.errors import UserError
    from mokd.distributed.accelerators import pick_device, promised_gpus
    from mokd.distributed.local_ranks import leave_at_once
    from mokd.distributed.process_group import (
        Ranks,
        abandon,
        broadcast_from_main,
        join,
        leave,
        ranks_from_environment,
        use_own_cores,
    )
    from mokd.distributed.stopping import StopRequest
    from mokd.runs import environment
    from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_USER, says_all, status_of_error
    from mokd.runs.files import replace_json
    from mokd.runs.heartbeat import Heartbeat, process_began
    from mokd.runs.run_directory import RunDirectory, StaleAttemptError, State
    from mokd.training.feasibility import check_shard_groups, images_per_rank
    from mokd.training.trainer import Outcome, Trainer

log = logging.getLogger(__name__)


def run(directory: Path, stop: StopRequest | None = None) -> Outcome:
    """Trains the run in `directory` from its newest checkpoint on, in this rank. Leaves its state in `status.json`.

    Every rank of the run calls it. `stop` is for a caller that has signal handlers of its own; without it this
    process's stop signals are taken over. After an exception the process group is still there: the caller leaves its
    word first, then calls `abandon`, which does not wait for ranks that are stuck in a collective.
    """
    if stop is None:
        stop = StopRequest()
        stop.install()
    imported = time.time()
    ranks = ranks_from_environment()
    directory_ = RunDirectory.open(directory)
    config = directory_.config()
    images_per_rank(config, ranks.world_size)
    check_shard_groups(config, ranks.world_size)
    device = pick_device(ranks, config.parallel.device, promised_gpus(ranks))
    join(ranks, device, config.parallel.startup_timeout_seconds)
    use_own_cores(config.parallel.threads_per_rank)
    attempt = _claim(directory_, ranks)
    heartbeat = Heartbeat(directory_, attempt, ranks.rank, {"imports": process_began(), "process group": imported})
    try:
        _mark(directory_, ranks, attempt, "starting")
        outcome = Trainer(directory_, config, ranks, device, stop, attempt, heartbeat).fit()
        leave()
        heartbeat.phase("done", outcome.step)
        _mark(directory_, ranks, attempt, outcome.state, **outcome.facts())
        return outcome
    except StaleAttemptError:
        raise
    except Exception as error:
        # whichever rank fails first says why, before it leaves the group; the others only see the connection close
        if ranks.is_main or not isinstance(error, dist.DistError):
            directory_.write_failure(attempt, error, ranks.rank)
        raise
    finally:
        heartbeat.close()


def _claim(directory: RunDirectory, ranks: Ranks) -> int:
    """The attempt's number: the launcher's, which took it before any rank started, or a new one, told to all."""
    number = int(os.environ.get("MOKD_ATTEMPT", "0"))
    if ranks.is_main:
        number = number or directory.claim_attempt({"world_size": ranks.world_size})
        replace_json(directory.environment_file, environment.describe())
    return broadcast_from_main(number)


def _mark(directory: RunDirectory, ranks: Ranks, attempt: int, state: State, **facts: Any) -> None:
    if ranks.is_main:
        directory.write_status(state, attempt, **facts)


def main(arguments: list[str]) -> int:
    """Trains and returns the exit status, one of `mokd.runs.exit_codes`."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # one-pixel-wide strides of depthwise convolutions: DDP copies those few gradients, which costs nothing here
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if len(arguments) != 1:
        print("usage: python -m mokd.training.entry RUN_DIRECTORY", file=sys.stderr)
        return EXIT_USER
    try:
        outcome = run(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        abandon()
        return EXIT_USER
    except StaleAttemptError as error:
        print(f"leaving: {error}", file=sys.stderr)
        return EXIT_SUPERSEDED
    except Exception as error:
        _say(error)
        abandon()
        return status_of_error(error)
    return EXIT_DONE if outcome.state == "done" else EXIT_STOPPED


def _say(error: Exception) -> None:
    """On stderr; with a traceback where the error's line is not all that there is to say."""
    ranks = ranks_from_environment()
    if isinstance(error, dist.DistError):
        print(f"rank {ranks.rank}: lost the others: {str(error).splitlines()[0]}", file=sys.stderr)
    elif not says_all(error):
        log.exception("%s", error)
    elif ranks.is_main or not getattr(error, "final", False):  # all ranks meet what is final
        print(f"failed: {error}", file=sys.stderr)


if __name__ == "__main__":
    leave_at_once(main(sys.argv[1:]))
