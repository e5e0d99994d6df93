"""What the memory order of convolutions costs in rounding and in time: two training steps in NHWC and in NCHW.

usage: python -m benchmarks.memory_order [--config CONFIG] [--rounds N] [key=value ...]

On CPUs torch's BatchNorm rounds coarser in NHWC than in NCHW. Reported of every branch: how far fp32 ends from fp64
after two steps from the same weights, as a share of how far the two steps went; and the milliseconds of a step,
alternating. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from mokd.config import RunConfig, load_config

CPU = torch.device("cpu")
ORDERS = {"nhwc": True, "nchw": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("step.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    print(json.dumps({"error": errors(config), "step_ms": milliseconds(config, given.rounds)}))


def errors(config: RunConfig) -> dict[str, dict[str, float]]:
    """By memory order and branch: the distance from fp64's students after two steps over the length of their way."""
    exact = Pair(in_order(config, channels_last=False), CPU)
    for branch in exact.branches:
        branch.student.double()
        branch.teacher.double()
    exact.objective.load_state_tensors({k: v.double() for k, v in exact.objective.state_tensors().items()})
    if hasattr(exact.objective, "centers"):
        exact.objective.centers = exact.objective.centers.double()
    began = [weights(branch.student) for branch in exact.branches]
    two_steps(exact, [view.double() for view in exact.views])
    ends = [weights(branch.student) for branch in exact.branches]
    found: dict[str, dict[str, float]] = {}
    for name, channels_last in ORDERS.items():
        pair = Pair(in_order(config, channels_last=channels_last), CPU)
        two_steps(pair, pair.views)
        found[name] = {
            branch.name: float((weights(branch.student) - end).norm() / (end - start).norm())
            for branch, start, end in zip(pair.branches, began, ends, strict=True)
        }
    return found


def milliseconds(config: RunConfig, rounds: int) -> dict[str, float]:
    """The median time of a step in both orders, alternating."""
    pairs = {name: Pair(in_order(config, channels_last=on), CPU) for name, on in ORDERS.items()}
    steps = {name: OurStep(pair) for name, pair in pairs.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step(pairs[name].views, FIRST_STEP + i)
            if i:  # the first one allocates
                spent[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in spent.items()}


def in_order(config: RunConfig, *, channels_last: bool) -> RunConfig:
    """The configuration with its convolutions in one memory order."""
    precision = config.precision.model_copy(update={"channels_last": channels_last, "compute": "fp32"})
    return config.model_copy(update={"precision": precision})


def two_steps(pair: Pair, views: list[Tensor]) -> None:
    step = OurStep(pair)
    for i in range(2):
        step(views, FIRST_STEP + i)


def weights(network: torch.nn.Module) -> Tensor:
    """All parameters in a row, in fp64."""
    return torch.cat([p.detach().double().flatten() for p in network.parameters()])


if __name__ == "__main__":
    main()
