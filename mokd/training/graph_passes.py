"""The passes as CUDA graphs, recorded once and replayed in every step.

A step launches thousands of small kernels, and at a few images per GPU the host, not the GPU, is what a step waits for.
A graph is one launch for all the kernels of a pass. It has fixed addresses, so views are copied to where it reads them,
and gradients lie where it writes them; and fixed numbers, so it is recorded again where those of the objective change
(temperatures that warm up, prototypes that begin to learn). What else a step does (the ranks' agreement and their mean
of gradients, clipping, optimisers, averages, centres) stays outside.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from mokd.config import RunConfig
from mokd.distributed.side_stream import SideStream
from mokd.objectives.base import Objective
from mokd.objectives.branch import Branch, BranchLoss, TeachingBranch, learning
from mokd.training.passes import Passes

# steps of a kind that run as usual before one is recorded: kernels are compiled, algorithms chosen, and constants come
# to the device
STEPS_AHEAD = 2

T = TypeVar("T")


class GraphPasses:
    """As `Passes`, on a GPU, for steps of one micro-batch whose gradients are dropped afterwards.

    What is returned in a replay holds until the next one. Steps before a recording run on the stream that records.
    """

    def __init__(
        self, config: RunConfig, branches: Sequence[TeachingBranch], objective: Objective[Any], device: torch.device
    ) -> None:
        self._branches, self._objective = branches, objective
        self._plain = Passes(config, branches, objective, device)
        self._beside = SideStream(device, wanted=True)
        self._kind: Hashable = None
        self._seen = 0  # steps of this kind
        self._recording: _Recording | None = None

    def teach(self, views: Sequence[Tensor], epoch: int) -> Any:
        """As `Passes.teach`; records first, where it is time."""
        shapes = tuple((view.shape, view.stride(), view.dtype) for view in views)
        kind = (self._objective.constants(self._branches, epoch), shapes)
        if kind != self._kind:
            self._kind, self._seen = kind, 0
            self._forget()
        if self._recording is None and self._seen >= STEPS_AHEAD:
            self._recording = self._record(views, epoch)
        self._seen += 1
        if self._recording is None:
            with self._aside():
                return self._plain.teach(views, epoch)
        torch._foreach_copy_(self._recording.views, list(views))
        self._recording.teachers.replay()
        return self._recording.taught

    def loss(self, branch: Branch, taught: Any, views: Sequence[Tensor], epoch: int) -> BranchLoss:
        """As `Passes.loss`."""
        if self._recording is None:
            with self._aside():
                return self._plain.loss(branch, taught, views, epoch)
        recorded = self._recording.branches[branch.name]
        recorded.forward.replay()
        return recorded.loss

    def backward(self, branch: Branch, loss: BranchLoss, scale: float) -> None:
        """As `Passes.backward`; `scale` is 1."""
        if self._recording is None:
            with self._aside():
                self._plain.backward(branch, loss, scale)
            return
        recorded = self._recording.branches[branch.name]
        recorded.backward.replay()
        for parameter, gradient in zip(branch.student.parameters(), recorded.gradients, strict=True):
            parameter.grad = gradient

    @contextmanager
    def _aside(self) -> Iterator[None]:
        with self._beside.begin():
            yield
        self._beside.join()

    def _forget(self) -> None:
        if self._recording is not None:
            self._recording = None
            gc.collect()
            torch.cuda.empty_cache()  # of the graphs' memory, which is of no use to others

    def _record(self, views: Sequence[Tensor], epoch: int) -> _Recording:
        fixed = [torch.empty_like(view) for view in views]
        torch.cuda.synchronize()
        gc.collect()
        gc.disable()  # nothing that belongs to work outside may be freed in between
        try:
            with self._aside():
                return _Recording(self._plain, learning(self._branches), fixed, epoch)
        finally:
            gc.enable()


class _Recording:
    """The graphs of a kind of step with the tensors that they read and write. They share memory, and so are replayed in
    the order in which they were recorded.
    """

    def __init__(self, passes: Passes, branches: Sequence[Branch], views: list[Tensor], epoch: int) -> None:
        self.views, self._pool = views, torch.cuda.graph_pool_handle()
        self.teachers, self.taught = self.graph(lambda: passes.teach(views, epoch))
        self.branches = {branch.name: _RecordedBranch(self, passes, branch, epoch) for branch in branches}

    def graph(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """What the GPU is asked to do by `work`, which only this records."""
        graph = torch.cuda.CUDAGraph()
        # other threads, the loader's and the one that saves, may do what is forbidden in a recording
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = work()
        except BaseException:
            with suppress(RuntimeError):  # a recording that is broken cannot be ended well
                graph.capture_end()
            raise
        graph.capture_end()
        return graph, result


class _RecordedBranch:
    """Two graphs, as the ranks come to an agreement between the last forward and the last backward pass."""

    def __init__(self, recording: _Recording, passes: Passes, branch: Branch, epoch: int) -> None:
        self.forward, loss = recording.graph(lambda: passes.loss(branch, recording.taught, recording.views, epoch))
        self.backward, _ = recording.graph(lambda: passes.backward(branch, loss, 1.0))
        # without what autograd holds
        self.loss = BranchLoss(loss.total.detach(), loss.terms, loss.weights, loss.observe)
        parameters = list(branch.student.parameters())
        self.gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
