"""Trains a run; the last rank is asked to stop after the first batch of the evaluation at a step.

usage: python -m tests.programs.stop_in_evaluation RUN_DIRECTORY STEP
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mokd.distributed.stopping import StopRequest
from mokd.evaluation import online
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.training import entry


def main(directory: str, step: int) -> int:
    stop = StopRequest()
    extract, evaluate = online.extract, online.OnlineEvaluation.evaluate
    at = [-1, False]

    def noted(self: online.OnlineEvaluation, backbones: Any, now: int) -> dict[str, dict[int, float]]:
        at[:] = [now, self._ranks.rank == self._ranks.world_size - 1]
        return evaluate(self, backbones, now)

    def asked_in_between(*arguments: Any) -> Iterator[Any]:
        for batch in extract(*arguments):
            yield batch
            if at == [step, True]:
                stop.request("the test asks the last rank only")

    online.OnlineEvaluation.evaluate = noted  # type: ignore[method-assign]
    online.extract = asked_in_between
    outcome = entry.run(Path(directory), stop)
    return EXIT_DONE if outcome.state == "done" else EXIT_STOPPED


if __name__ == "__main__":
    entry.leave_at_once(main(sys.argv[1], int(sys.argv[2])))
