"""The passes replayed as CUDA graphs against the same passes as they are, on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mokd.config import PrecisionConfig, RunConfig
from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.objectives.base import build_objective
from mokd.optim.precision import set_arithmetic, view_dtype
from mokd.parallel.build import build_branch
from mokd.training.graph_passes import STEPS_AHEAD, GraphPasses
from mokd.training.passes import Passes
from mokd.training.step import NonFiniteLossError, TrainingStep
from tests.support import RESNET, VIT, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPOCH_STEPS = 5  # of which the last ones of an epoch are replayed
CHANGES: dict[str, Any] = {
    "branches": [RESNET, {**VIT, "drop_path": 0.3}],  # draws random numbers
    "optim__warmup_epochs": 0,
    "precision__compute": "bf16",
    "precision__deterministic": True,
}


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    yield
    set_arithmetic(PrecisionConfig())


class Trained:
    """A run of some steps on views of noise, from the configuration's first weights."""

    def __init__(self, config: RunConfig) -> None:
        set_arithmetic(config.precision)
        self.config, self.device = config, torch.device("cuda", 0)
        self.images = config.optim.global_batch
        self.objective = build_objective(config, self.device)
        self.branches: list[Any] = [
            build_branch(config, b, self.objective, self.device, images_per_rank=self.images, epoch_steps=EPOCH_STEPS)
            for b in config.branches
        ]
        self.step = TrainingStep(
            config, self.branches, self.objective, StopRequest(), Ranks(), self.device, EPOCH_STEPS
        )
        self.replayed: list[bool] = []

    def run(self, first: int, last: int) -> list[float]:
        """Every term of every step."""
        terms = []
        for number in range(first, last):
            done = self.step.run(number, self.views(number), number // EPOCH_STEPS, measure=number % 2 == 0)
            terms += [loss.total for loss in done.losses] + [t for loss in done.losses for t in loss.terms.values()]
            for loss in done.losses:
                loss.observe()
            self.replayed.append(getattr(self.step._passes, "_recording", None) is not None)
        return torch.stack(terms).tolist()

    def views(self, number: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        shapes = [(g.count, self.images, 3, g.size_px, g.size_px) for g in self.config.views.groups]
        dtype = view_dtype(self.config.precision, self.device)
        return [torch.randn(shape, generator=generator).to(self.device, dtype) for shape in shapes]

    def state(self) -> list[torch.Tensor]:
        networks = [network for b in self.branches for network in (b.student, b.teacher)]
        tensors = [t for network in networks for t in network.state_dict().values()]
        moments = [t for b in self.branches for t in b.optimizer.state_tensors().values()]
        return [t.detach().clone() for t in [*tensors, *moments, *self.objective.state_tensors().values()]]


def test_replays_give_the_same_bits_as_the_passes_themselves() -> None:
    """Over two epochs, of which the first has other constants: frozen prototypes and another temperature."""
    plain, graphs = (Trained(tiny_config(execution__cuda_graphs=on, **CHANGES)) for on in (False, True))
    assert type(plain.step._passes) is Passes
    assert type(graphs.step._passes) is GraphPasses
    terms = [run.run(0, 2 * EPOCH_STEPS) for run in (plain, graphs)]
    once = [False] * STEPS_AHEAD + [True] * (EPOCH_STEPS - STEPS_AHEAD)
    assert graphs.replayed == [*once, *once]
    assert terms[0] == terms[1]
    different = [not torch.equal(a, b) for a, b in zip(plain.state(), graphs.state(), strict=True)]
    assert sum(different) == 0


def test_no_wait_for_the_gpu_in_a_replay() -> None:
    run = Trained(tiny_config(execution__cuda_graphs=True, **CHANGES))
    run.run(EPOCH_STEPS, EPOCH_STEPS + STEPS_AHEAD + 1)
    views = run.views(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step._gradients(EPOCH_STEPS + STEPS_AHEAD + 1, views, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_that_is_not_finite_stops_a_replayed_step() -> None:
    run = Trained(tiny_config(execution__cuda_graphs=True, **CHANGES))
    run.run(0, STEPS_AHEAD + 1)
    before = [p.detach().clone() for b in run.branches for p in b.student.parameters()]
    views = [view.fill_(torch.nan) for view in run.views(0)]
    with pytest.raises(NonFiniteLossError):
        run.step.run(STEPS_AHEAD + 1, views, 0)
    parameters = [p for b in run.branches for p in b.optimizer.state_tensors().values()]
    assert all(bool(torch.isfinite(p).all()) for p in parameters)
    after = [p for b in run.branches for p in b.student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
