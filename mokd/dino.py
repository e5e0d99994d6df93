"""MOKD's objective: self- and cross-distillation over prototypes, with the cross-attention feature search.

Shape letters: V student views, Q teacher (global) views, L local views, B images per rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.config import ViewsConfig
from mokd.branch import Branch, BranchLoss
from mokd.config import BranchConfig, DinoConfig
from mokd.distributed import world_size
from mokd.losses import Target, entropy
from mokd.monitors import feature_monitors
from mokd.network import NetworkOutput, build_network
from mokd.prototype_loss import prototype_loss
from mokd.prototypes import HeadOutput
from mokd.schedules import teacher_temperature
from mokd.targets import softmax, teacher_probabilities

HEADS = ("mlp", "t_head")


class DinoObjective:
    """The four terms of the paper for any number of branches; one branch alone has the two self terms."""

    def __init__(
        self,
        config: DinoConfig,
        views: ViewsConfig,
        names: Sequence[str],
        device: torch.device,
        *,
        frozen_epochs: int = 0,
        recompute_logits: bool | None = None,
    ) -> None:
        self.config = config
        self.views = views
        self.names = list(names)
        self.frozen_epochs = frozen_epochs  # in which prototypes get no gradients
        self.recompute_logits = recompute_logits
        # one centre per branch and head, shared by the self and the cross terms
        self.centers = torch.zeros(len(names), len(HEADS), config.prototypes, device=device)
        # means of teacher outputs, one for each micro-batch of a step, and the collectives that sum them up over ranks
        self._seen: list[Tensor] = []
        self._arriving: list[dist.Work] = []

    def build_branch(self, config: BranchConfig, images_per_rank: int) -> Branch:
        """Student and teacher of one branch."""
        student = build_network(config, self.config, self.views, student=True, images_per_rank=images_per_rank)
        teacher = build_network(config, self.config, self.views, student=False, images_per_rank=images_per_rank)
        return Branch(config, student, teacher)

    def losses(self, branches: Sequence[Branch], views: Sequence[Tensor], epoch: int) -> Iterator[BranchLoss]:
        """One loss per branch for groups of views, the global group first.

        A branch's forward pass is made when its loss is asked for: differentiated at once, it leaves no activations
        behind before the next one's exist.
        """
        teachers = self._teachers(branches, views)
        for i in range(len(branches)):
            yield self._loss(i, branches, teachers, views, epoch)

    def _loss(
        self, i: int, branches: Sequence[Branch], teachers: _Teachers, views: Sequence[Tensor], epoch: int
    ) -> BranchLoss:
        """The loss of branch i, which learns from its own teacher and from all others."""
        branch, on = branches[i], self.config.terms
        own = self._temperature(epoch, branch.config.teacher_temp_warmup_epochs)
        cross = self._temperature(epoch, self.config.cross_temp_warmup_epochs)
        others = [j for j in range(len(branches)) if j != i]
        student: NetworkOutput = branch.forward_student(list(views))
        with torch.no_grad():
            mlp = {"self_mlp": Target(teachers.probabilities(i, 0, own), float(on.self_mlp))}
            t_head = {"self_thead": Target(teachers.probabilities(i, 1, own), float(on.self_thead))}
            # with several others the mean of their targets is the target of the mean loss
            if others and on.cross_mlp:
                probabilities = _mean([teachers.probabilities(j, 0, cross) for j in others])
                mlp["cross_mlp"] = Target(probabilities, branch.config.weight)
            if others and on.cross_search:
                first = self.views.global_crops.count
                queries = student.queries[first:]
                found = _mean([self._search(branches[j], teachers.outputs[j], queries, cross) for j in others])
                t_head["cross_search"] = Target(found, branch.config.weight, paired=False, first_view=first)
        return self._branch_loss(i, student, mlp, t_head, trains_prototypes=epoch >= self.frozen_epochs)

    def _teachers(self, branches: Sequence[Branch], views: Sequence[Tensor]) -> _Teachers:
        with torch.no_grad():
            teachers = _Teachers([branch.teacher(views[:1]) for branch in branches], self.centers)
            seen = torch.stack([torch.stack([head.mean(dim=(0, 1)) for head in pair]) for pair in teachers.logits])
            self._seen.append(seen)
            if dist.is_initialized():  # one collective for all centres, on its way while the step is computed
                self._arriving.append(dist.all_reduce(seen, async_op=True))
        return teachers

    def _branch_loss(
        self,
        i: int,
        student: NetworkOutput,
        mlp: dict[str, Target],
        t_head: dict[str, Target],
        *,
        trains_prototypes: bool,
    ) -> BranchLoss:
        """`L_sm + L_st + lambda (L_cm + L_ct)`, the cross terms averaged over the other branches."""
        total: Tensor | float = 0.0
        terms: dict[str, Tensor] = {}
        for output, targets in ((student.mlp, mlp), (student.t_head, t_head)):
            loss, values = prototype_loss(
                output,
                list(targets.values()),
                self.config.student_temp,
                train_prototypes=trains_prototypes,
                recompute=self.recompute_logits,
            )
            total = total + loss
            terms.update(zip(targets, values, strict=True))
        assert isinstance(total, Tensor)
        pooled, center, own = student.pooled.detach(), self.centers[i], mlp["self_mlp"].probabilities

        def monitors() -> dict[str, Tensor]:
            return {"teacher_entropy": entropy(own), "center_norm": center.norm(), **feature_monitors(pooled)}

        return BranchLoss(total, terms, monitors)

    def _search(self, other: Branch, teacher: NetworkOutput, queries: Tensor, temperature: float) -> Tensor:
        """What local queries `[L, B, d]` find in global view 1 of another branch's teacher: targets `[L, B, K]`."""
        rows = other.teacher.search(teacher.tokens, queries)  # type: ignore[operator]
        return softmax(HeadOutput(rows, teacher.t_head.prototypes).logits(temperature))

    def _temperature(self, epoch: int, warmup_epochs: int) -> float:
        return teacher_temperature(epoch, warmup_epochs, *self.config.teacher_temp)

    @torch.no_grad()
    def commit(self) -> None:
        """Moves the centres towards the teacher outputs' mean over the global batch, one collective for all."""
        assert self._seen, "commit follows losses"
        for arriving in self._arriving:
            arriving.wait()
        seen = torch.stack(self._seen).mean(dim=0) / world_size()
        self.centers.lerp_(seen.to(self.centers.dtype), 1.0 - self.config.center_momentum)
        self._seen.clear()
        self._arriving.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """The centres, `center/<branch>/<head>`."""
        places = [(i, h) for i in range(len(self.names)) for h in range(len(HEADS))]
        return {f"center/{self.names[i]}/{HEADS[h]}": self.centers[i, h] for i, h in places}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores the centres."""
        for key, center in self.state_tensors().items():
            center.copy_(tensors[key])

    def loss_bytes(self, images_per_rank: int) -> int:
        """What lies over all prototypes at a time, in fp32: of every teacher head its logits and targets at two
        temperatures; of one student head after another its logits, and what its queries have found.
        """
        teachers = len(self.names) * len(HEADS) * self.views.global_crops.count * 3
        student = self.views.count + self.views.local_crops.count
        return (teachers + student) * images_per_rank * self.config.prototypes * 4


class _Teachers:
    """What all teachers say of a batch. A target that several terms share is computed once."""

    def __init__(self, outputs: Sequence[NetworkOutput], centers: Tensor) -> None:
        self.outputs = outputs
        self.logits = [(output.mlp.logits(), output.t_head.logits()) for output in outputs]
        self._centers = centers
        self._known: dict[tuple[int, int, float], Tensor] = {}

    def probabilities(self, branch: int, head: int, temperature: float) -> Tensor:
        """The centred targets `[Q, B, K]` of a branch's head."""
        key = (branch, head, temperature)
        if key not in self._known:
            logits, center = self.logits[branch][head], self._centers[branch, head]
            self._known[key] = teacher_probabilities(logits, center, temperature)
        return self._known[key]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(dim=0)
