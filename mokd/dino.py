"""MOKD's objective: self- and cross-distillation over prototypes, with the cross-attention feature search.

Shape letters: V student views, Q teacher (global) views, L local views, B images per rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.config import ViewsConfig
from mokd.branch import Branch, BranchLoss
from mokd.config import BranchConfig, DinoConfig
from mokd.losses import Target, entropy, teacher_probabilities
from mokd.monitors import feature_monitors
from mokd.network import NetworkOutput, build_network
from mokd.prototype_loss import prototype_loss
from mokd.prototypes import HeadOutput
from mokd.schedules import teacher_temperature

HEADS = ("mlp", "t_head")


class DinoObjective:
    """The four terms of the paper for any number of branches; one branch alone has the two self terms."""

    def __init__(self, config: DinoConfig, views: ViewsConfig, names: Sequence[str], device: torch.device) -> None:
        self.config = config
        self.views = views
        self.names = list(names)
        # one centre per branch and head, shared by the self and the cross terms
        self.centers = torch.zeros(len(names), len(HEADS), config.prototypes, device=device)
        self._seen: Tensor | None = None

    def build_branch(self, config: BranchConfig, images_per_rank: int) -> Branch:
        """Student and teacher of one branch."""
        student = build_network(config, self.config, self.views, student=True, images_per_rank=images_per_rank)
        teacher = build_network(config, self.config, self.views, student=False, images_per_rank=images_per_rank)
        return Branch(config, student, teacher)

    def losses(self, branches: Sequence[Branch], views: Sequence[Tensor], epoch: int) -> list[BranchLoss]:
        """One loss per branch for groups of views, the global group first."""
        students: list[NetworkOutput] = [branch.forward_student(list(views)) for branch in branches]
        with torch.no_grad():
            teachers: list[NetworkOutput] = [branch.teacher(views[:1]) for branch in branches]
            logits = [(t.mlp.logits(), t.t_head.logits()) for t in teachers]
            self._seen = torch.stack([torch.stack([head.mean(dim=(0, 1)) for head in pair]) for pair in logits])
            cross = self._temperature(epoch, self.config.cross_temp_warmup_epochs)
            # the targets that a branch offers to all others, computed once
            offered = [
                teacher_probabilities(pair[0], self.centers[j, 0], cross) if self._crosses else None
                for j, pair in enumerate(logits)
            ]
        result = []
        for i, branch in enumerate(branches):
            with torch.no_grad():
                own = self._temperature(epoch, branch.config.teacher_temp_warmup_epochs)
                self_mlp, self_thead = (
                    teacher_probabilities(logits[i][h], self.centers[i, h], own) for h in range(len(HEADS))
                )
                found = self._search(i, branches, students[i], teachers, cross)
            others = [p for j, p in enumerate(offered) if j != i and p is not None]
            result.append(self._branch_loss(branch, i, students[i], self_mlp, self_thead, others, found))
        return result

    def _branch_loss(
        self,
        branch: Branch,
        i: int,
        student: NetworkOutput,
        self_mlp: Tensor,
        self_thead: Tensor,
        cross_mlp: Sequence[Tensor],
        cross_search: Sequence[Tensor],
    ) -> BranchLoss:
        """`L_sm + L_st + lambda (L_cm + L_ct)`, the cross terms averaged over the other branches."""
        on, weight = self.config.terms, branch.config.weight
        locals_from = self.views.global_crops.count
        # with several others the mean of their targets is the target of the mean loss
        mlp = [("self_mlp", Target(self_mlp, float(on.self_mlp)))]
        t_head = [("self_thead", Target(self_thead, float(on.self_thead)))]
        if cross_mlp:
            mlp.append(("cross_mlp", Target(_mean(cross_mlp), weight)))
        if cross_search:
            t_head.append(("cross_search", Target(_mean(cross_search), weight, paired=False, first_view=locals_from)))
        total: Tensor | float = 0.0
        terms: dict[str, Tensor] = {}
        for output, targets in ((student.mlp, mlp), (student.t_head, t_head)):
            loss, values = self._head_loss(output, [target for _, target in targets])
            total = total + loss
            terms.update(zip((name for name, _ in targets), values, strict=True))
        assert isinstance(total, Tensor)
        pooled, center = student.pooled.detach(), self.centers[i]

        def monitors() -> dict[str, Tensor]:
            return {
                "teacher_entropy": entropy(self_mlp),
                "center_norm": center.norm(),
                **feature_monitors(pooled),
            }

        return BranchLoss(total, terms, monitors)

    def _head_loss(self, output: HeadOutput, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        return prototype_loss(output, targets, self.config.student_temp)

    def _search(
        self, i: int, branches: Sequence[Branch], student: NetworkOutput, teachers: Sequence[NetworkOutput], temp: float
    ) -> list[Tensor]:
        """For every other branch j: what i's local queries find in global view 1 of j's teacher, `[L, B, K]`."""
        if not self.config.terms.cross_search:
            return []
        queries = student.queries[self.views.global_crops.count :]
        found = []
        for j, other in enumerate(branches):
            if j != i:
                rows = other.teacher.search(teachers[j].tokens, queries)  # type: ignore[operator]
                logits = HeadOutput(rows, teachers[j].t_head.prototypes).logits()
                found.append(teacher_probabilities(logits, None, temp))
        return found

    @property
    def _crosses(self) -> bool:
        return self.config.terms.cross_mlp and len(self.names) > 1

    def _temperature(self, epoch: int, warmup_epochs: int) -> float:
        return teacher_temperature(epoch, warmup_epochs, *self.config.teacher_temp)

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the centres towards the teacher outputs' mean over the global batch, one collective for all."""
        seen = self._seen
        assert seen is not None, "commit follows losses"
        if dist.is_initialized():
            dist.all_reduce(seen)
            seen = seen / dist.get_world_size()
        self.centers.lerp_(seen.to(self.centers.dtype), 1.0 - self.config.center_momentum)
        self._seen = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The centres, `center/<branch>/<head>`."""
        places = [(i, h) for i in range(len(self.names)) for h in range(len(HEADS))]
        return {f"center/{self.names[i]}/{HEADS[h]}": self.centers[i, h] for i, h in places}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the centres."""
        for key, center in self.state_tensors().items():
            center.copy_(tensors[key])


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(dim=0)
