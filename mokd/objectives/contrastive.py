"""The contrastive objective: InfoNCE against a memory bank per branch, within a branch and between branches.

Shape letters: V views (2), B images per rank, G images over all ranks, N tokens, D width of keys, K keys of a bank.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from mokd.config import BranchConfig, ContrastiveConfig, RunConfig
from mokd.config.ramps import factor
from mokd.losses.info_nce import CHUNK, info_nce
from mokd.models.backbones import build_for_views
from mokd.objectives.branch import Branch, BranchLoss, Observation, TeachingBranch, normalized_features
from mokd.objectives.contrastive_network import ContrastiveNetwork, ContrastiveOutput, Seen
from mokd.objectives.memory_bank import bank_tensors, gather_keys, load_bank_tensors, memory_banks


class ContrastiveObjective:
    """`self + beta * cross` for any number of branches; one branch alone is momentum contrast."""

    def __init__(self, config: ContrastiveConfig, run: RunConfig, device: torch.device) -> None:
        self.config, self.views, self.epochs = config, run.views, run.optim.epochs
        self.keys_per_step = run.views.count * run.optim.global_batch
        self.crosses = len(run.branches) > 1 and config.cross_weight > 0.0
        widths = {branch.name: config.width for branch in run.branches}
        self.banks = memory_banks(config.bank, widths, run.seed, device)
        self._keys: list[Tensor] = []  # of the micro-batches of this step

    def build_network(self, config: BranchConfig, images_per_rank: int, *, student: bool) -> ContrastiveNetwork:
        """The student or teacher of one branch."""
        backbone, shapes = build_for_views(config, self.views, student=student, images_per_rank=images_per_rank)
        return ContrastiveNetwork(backbone, shapes, self.config, alone=config.frozen or not self.crosses)

    @torch.no_grad()
    def teach(self, branches: Sequence[TeachingBranch], views: Sequence[Tensor], epoch: int) -> list[Seen]:
        """What all teachers say of the one group of views, `[V, B, 3, S, S]`."""
        (crops,) = views
        # training mode: BatchNorm uses the statistics of this batch, of all ranks where there are several
        teachers: list[ContrastiveOutput] = [branch.teacher(crops, dense=self.crosses) for branch in branches]
        return [Seen(teacher.projected, teacher.dense) for teacher in teachers]

    def remember(self, taught: list[Seen]) -> None:
        """The keys."""
        self._keys.append(torch.stack([seen.projected for seen in taught]))

    def constants(self, branches: Sequence[TeachingBranch], epoch: int) -> Hashable:
        """The weights of the cross terms."""
        return tuple(factor(branch.config.weight_ramp, epoch, self.epochs) for branch in branches)

    def loss(
        self, branch: Branch, branches: Sequence[TeachingBranch], seen: list[Seen], views: Sequence[Tensor], epoch: int
    ) -> BranchLoss:
        """The loss of a branch, whose positives are its own teacher's keys and what it aligns of the others': the self
        term, and the mean over the other branches of the cross terms; each a mean over views and images.
        """
        (crops,) = views
        i = branches.index(branch)
        others = [j for j in range(len(branches)) if j != i and self.crosses]
        student: ContrastiveOutput = branch.forward_student(crops, others=[seen[j] for j in others])
        queries = student.projected.flatten(0, 1)
        positives = seen[i].projected.flip(0).flatten(0, 1)
        rows, hardest = self._against_bank(queries, positives, branch.name)
        total = rows.mean()
        terms = {"self": total.detach()}
        weight = branch.config.weight * factor(branch.config.weight_ramp, epoch, self.epochs)
        cross_weight = self.config.cross_weight * weight
        if others:
            pairs = zip(others, student.aligned, strict=True)
            losses = [self._against_bank(queries, k.flatten(0, 1), branches[j].name)[0].mean() for j, k in pairs]
            cross = torch.stack(losses).mean()
            terms["cross"] = cross.detach()
            total = total + cross_weight * cross
        pooled, similarity = student.pooled[0].detach(), (queries.detach() * positives).sum(dim=-1)
        age = self.banks[branch.name].age(self.keys_per_step)

        def observe() -> Observation:
            return Observation(
                features=normalized_features(pooled),
                scalars={
                    "bank_age": torch.full_like(similarity[0], age),
                    "positive_similarity": similarity.mean(),
                    "hardest_negative_similarity": hardest.mean(),
                },
            )

        return BranchLoss(total, terms, {"self": 1.0, "cross": cross_weight}, observe)

    def _against_bank(self, queries: Tensor, positives: Tensor, bank: str) -> tuple[Tensor, Tensor]:
        return info_nce(queries, positives, self.banks[bank].keys, self.config.temperature)

    def commit(self) -> None:
        """Puts this step's teacher keys into the banks; not before, or a query would meet its positive as negative."""
        assert self._keys, "commit follows losses"
        keys_of_step = torch.cat(self._keys, dim=2)  # micro-batches are contiguous parts of a rank's images
        dtype = next(iter(self.banks.values())).keys.dtype
        for bank, keys in zip(self.banks.values(), gather_keys(keys_of_step.to(dtype)), strict=True):
            bank.push(keys)
        self._keys.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """The banks, `bank/<branch>/{keys,written}`."""
        return bank_tensors("bank", self.banks)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the banks."""
        load_bank_tensors("bank", self.banks, tensors)

    def loss_bytes(self, images_per_rank: int) -> int:
        """The banks, and a chunk of similarities with its exponentials, in fp32."""
        keys = next(iter(self.banks.values())).keys
        rows = self.views.count * images_per_rank
        return len(self.banks) * keys.numel() * keys.element_size() + 2 * rows * min(CHUNK, keys.shape[0]) * 4
