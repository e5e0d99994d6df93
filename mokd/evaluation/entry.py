"""From a request to its results on this machine: in this process, in local ranks, or as one rank of a launcher's.

`python -m mokd.evaluation.entry REQUEST` is what a local rank runs.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

from data_pipeline.core.errors import DataError, UserError
from mokd.distributed.accelerators import pick_device, promised_gpus
from mokd.distributed.local_ranks import leave_at_once, supervise
from mokd.distributed.process_group import (
    barrier,
    decided_by_main,
    join,
    leave,
    ranks_from_environment,
    set_timeout,
    use_own_cores,
)
from mokd.evaluation import results
from mokd.evaluation.data import warn_same
from mokd.evaluation.job import Job, configuration, holding, perform, prepare, records_of
from mokd.evaluation.request import Request
from mokd.evaluation.results import Evaluation
from mokd.optim.precision import set_arithmetic
from mokd.runs.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_USER

JOIN_TIMEOUT_SECONDS = 1800.0


def evaluate(request: Request, nproc: int) -> tuple[Evaluation | None, int]:
    """The results that were asked for, and an exit status; they are None in ranks that are not the first.

    Under torchrun or srun this process is one of their ranks, else `nproc` ranks are started. UserError.
    """
    ranks = ranks_from_environment()
    if ranks.world_size == 1 and nproc > 1:
        with holding(request) as held:
            job = prepare(held)  # mistakes are found, and told, once
            warn_same(job.train, job.test)
            command = [sys.executable, "-m", "mokd.evaluation.entry", json.dumps(held.to_json())]
            status = supervise(command, nproc)
        return (records_of(job, results.read(job.path)) if status == EXIT_DONE else None), status
    try:
        job, evaluation = _as_rank(request, warns=ranks.is_main)
    except UserError:  # the same on all ranks
        if ranks.is_main:
            raise
        return None, EXIT_USER
    return (records_of(job, evaluation) if ranks.is_main else None), EXIT_DONE


def _as_rank(request: Request, *, warns: bool = False) -> tuple[Job, Evaluation]:
    ranks = ranks_from_environment()
    device = pick_device(ranks, configuration(request).parallel.device, promised_gpus(ranks))
    join(ranks, device, JOIN_TIMEOUT_SECONDS)
    try:
        with ExitStack() as stack:
            # one rank decides which checkpoint, verifies it and holds it until all have done with it
            held = decided_by_main(lambda: stack.enter_context(holding(request)))
            job = prepare(held)
            if warns:
                warn_same(job.train, job.test)
            if ranks.world_size > 1:
                use_own_cores(job.config.parallel.threads_per_rank)
            set_arithmetic(job.config.precision)
            set_timeout(job.config.parallel.timeout_seconds)
            evaluation = perform(job, ranks, device)
            barrier()  # nobody leaves before the results are written
        return job, evaluation
    finally:
        leave()


def main(arguments: list[str]) -> int:
    """One local rank; the first says what went wrong, unless only another knows."""
    try:
        _as_rank(Request.from_json(json.loads(arguments[0])))
    except UserError as error:  # the same on all ranks
        if ranks_from_environment().is_main:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except DataError as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    leave_at_once(main(sys.argv[1:]))
