"""What monitors cost: our step measured and not, in turns, on a synthetic batch. A part of `mokd bench step`.

By itself: python -m benchmarks.step_monitors [CONFIG] [key=value ...] [--record]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, describe
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair, synchronise
from mokd.config import load_config
from mokd.distributed.accelerators import pick_device
from mokd.distributed.process_group import Ranks
from mokd.monitoring.alarms import Rules
from mokd.monitoring.monitors import Monitors, OfRank

ROUNDS = 15


def run(pair: Pair, rounds: int) -> dict[str, Any]:
    """Medians in ms of a step with and without monitors, and the ratio of the two as `logging.every_steps` mixes them.

    With: gradients and updates measured, numbers gathered, brought to the host, evaluated there and shown to the rules.
    """
    ours, device = OurStep(pair).step, pair.device
    monitors, rules = Monitors(pair.config, Ranks(), device), Rules(pair.config, 1)
    names = [branch.name for branch in pair.branches]
    ms: dict[bool, list[float]] = {False: [], True: []}
    for number in range(-1, rounds):
        for measured in ms:
            synchronise(device)
            began = time.perf_counter()
            done = ours.run(FIRST_STEP, pair.views, pair.epoch, measure=measured)
            if measured:
                shown = monitors.collect(names, done.losses, done.updates, OfRank(0.0, 0.0))
                assert shown is not None
                rules.observe({"step": FIRST_STEP + number, "images_per_second": 1.0, **shown.measured().values})
            synchronise(device)
            if number >= 0:
                ms[measured].append(1e3 * (time.perf_counter() - began))
    extra = statistics.median(b - a for a, b in zip(ms[False], ms[True], strict=True))
    without, every = statistics.median(ms[False]), pair.config.logging.every_steps
    return {
        "without_ms": without,
        "measured_ms": statistics.median(ms[True]),
        "extra_ms": extra,
        "every_steps": every,
        "ratio": 1.0 + extra / without / every,
        "rounds": rounds,
    }


def main(arguments: list[str]) -> None:
    """Measures, prints, and with --record keeps the figures in benchmarks/results/monitors.json."""
    given = [argument for argument in arguments if not argument.startswith("--")]
    file = Path(given.pop(0)) if given and "=" not in given[0] else ROOT / "benchmarks" / "step.yaml"
    config = load_config(file, given)
    result = run(Pair(config, pick_device(Ranks())), ROUNDS)
    result |= {
        "config": config.name,
        "batch": config.optim.global_batch,
        "machine": describe(("torch", "timm"), ("mokd",)),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if "--record" in arguments:
        (ROOT / "benchmarks" / "results" / "monitors.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
