"""Distillation from frozen branches alone: SEED (similarities over a queue), or regression of their features.

The static rivals of learning together: every branch that learns imitates every frozen one, and learns nothing else.

Shape letters: V views, B images per rank, D width of a frozen branch's features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mokd.config import BranchConfig, RegressionConfig, RunConfig, SeedConfig
from mokd.losses.distillation import feature_regression, similarity_distillation, standardised
from mokd.models.backbones import build_for_views, measure_shapes
from mokd.models.heads import unit_vectors
from mokd.objectives.branch import Branch, BranchLoss, Observation, TeachingBranch, normalized_features
from mokd.objectives.distillation_network import DistillationNetwork, DistillationOutput
from mokd.objectives.memory_bank import MemoryBank, bank_tensors, gather_keys, load_bank_tensors, memory_banks

# a frozen branch's features as targets `[V, B, D]`, by its name
Targets = dict[str, Tensor]


class DistillationObjective:
    """One term, the mean over frozen branches; both networks see the same views. The targets are pooled features."""

    def __init__(self, config: SeedConfig | RegressionConfig, run: RunConfig, device: torch.device) -> None:
        self.config, self.views = config, run.views
        frozen, px = [branch for branch in run.branches if branch.frozen], run.views.global_crops.size_px
        self.widths = {b.name: measure_shapes(b, px, [px], run.views.channels).pooled_width for b in frozen}
        self.queues: dict[str, MemoryBank] = {}
        if isinstance(config, SeedConfig):
            self.queues = memory_banks(config.queue, self.widths, run.seed, device)
        self._seen: list[Targets] = []  # of the micro-batches of this step

    def build_network(self, config: BranchConfig, images_per_rank: int, *, student: bool) -> DistillationNetwork:
        """The student or teacher of one branch; that of a frozen one is its backbone."""
        backbone, shapes = build_for_views(config, self.views, student=student, images_per_rank=images_per_rank)
        targets = {} if config.frozen else self.widths
        return DistillationNetwork(backbone, shapes.pooled_width, targets, self.config.projector)

    @torch.no_grad()
    def teach(self, branches: Sequence[TeachingBranch], views: Sequence[Tensor], epoch: int) -> Targets:
        """The targets that the frozen branches give for the one group of views; the other teachers are not run."""
        (crops,) = views
        prepare = unit_vectors if isinstance(self.config, SeedConfig) else standardised
        return {b.name: prepare(b.teacher(crops).pooled) for b in branches if b.config.frozen}

    def remember(self, taught: Targets) -> None:
        """The targets, for the queues."""
        self._seen.append(taught)

    def constants(self, branches: Sequence[TeachingBranch], epoch: int) -> Hashable:
        """None."""
        return ()

    def loss(
        self, branch: Branch, branches: Sequence[TeachingBranch], taught: Targets, views: Sequence[Tensor], epoch: int
    ) -> BranchLoss:
        """The loss of a branch that learns."""
        (crops,) = views
        student: DistillationOutput = branch.forward_student(crops)
        losses = [
            self._term(name, projected.flatten(0, 1), taught[name].flatten(0, 1))
            for name, projected in zip(self.widths, student.projected, strict=True)
        ]
        total = torch.stack(losses).mean()
        pooled = student.pooled[0].detach()
        name = "similarity" if isinstance(self.config, SeedConfig) else "regression"
        return BranchLoss(total, {name: total.detach()}, {name: 1.0}, lambda: Observation(normalized_features(pooled)))

    def _term(self, name: str, projected: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.config, RegressionConfig):
            return feature_regression(projected, targets)
        temperatures = self.config.student_temp, self.config.teacher_temp
        return similarity_distillation(unit_vectors(projected), targets, self.queues[name].keys, *temperatures)

    def commit(self) -> None:
        """Puts this step's targets into the queues, in the order of the global batch, whatever the number of ranks."""
        assert self._seen, "commit follows losses"
        for name, queue in self.queues.items():
            # micro-batches are contiguous parts of a rank's images
            keys = torch.cat([taught[name] for taught in self._seen], dim=1)
            (gathered,) = gather_keys(keys.unsqueeze(0).to(queue.keys.dtype))
            queue.push(gathered)
        self._seen.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """The queues, `queue/<branch>/{keys,written}`."""
        return bank_tensors("queue", self.queues)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the queues."""
        load_bank_tensors("queue", self.queues, tensors)

    def loss_bytes(self, images_per_rank: int) -> int:
        """The queues, and of one comparison with a queue similarities, targets and their products, in fp32."""
        rows = self.views.count * images_per_rank
        sizes = [queue.keys.numel() * queue.keys.element_size() for queue in self.queues.values()]
        kept = [3 * rows * queue.keys.shape[0] * 4 for queue in self.queues.values()]
        return sum(sizes) + max(kept, default=0)
