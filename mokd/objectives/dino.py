"""MOKD's objective: self- and cross-distillation over prototypes, with the cross-attention feature search.

Shape letters: V student views, Q teacher (global) views, L local views, B images per rank, K prototypes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mokd.config import BranchConfig, DinoConfig, RunConfig
from mokd.config.ramps import factor
from mokd.distributed.process_group import world_size
from mokd.distributed.side_stream import SideStream
from mokd.losses.kernels.targets import Target, entropy
from mokd.losses.prototype_loss import prototype_loss
from mokd.losses.prototypes import HeadOutput
from mokd.losses.teacher_probabilities import softmax, teacher_probabilities
from mokd.models.backbones import build_for_views
from mokd.models.heads import MlpHead, THead
from mokd.objectives.branch import Branch, BranchLoss, Observation, TeachingBranch, normalized_features
from mokd.objectives.dino_network import Network, NetworkOutput
from mokd.optim.schedules import teacher_temperature

HEADS = ("mlp", "t_head")
TERMS = ("self_mlp", "self_thead", "cross_mlp", "cross_search")


class DinoObjective:
    """The four terms of the paper for any number of branches; one branch alone has the two self terms."""

    def __init__(self, config: DinoConfig, run: RunConfig, device: torch.device) -> None:
        self.config, self.views, self.epochs = config, run.views, run.optim.epochs
        self.names = names = [branch.name for branch in run.branches]
        self.frozen_epochs = run.optim.freeze_last_layer_epochs  # in which prototypes get no gradients
        self.recompute_logits = run.execution.recompute_logits
        self._beside = SideStream(device, wanted=run.execution.overlap_teachers)
        # one centre per branch and head, shared by the self and the cross terms
        self.centers = torch.zeros(len(names), len(HEADS), config.prototypes, device=device)
        # means of teacher outputs, one for each micro-batch of a step, and the collectives that sum them up over ranks
        self._seen: list[Tensor] = []
        self._arriving: list[dist.Work] = []

    def build_network(self, config: BranchConfig, images_per_rank: int, *, student: bool) -> Network:
        """The student or teacher of one branch."""
        backbone, shapes = build_for_views(config, self.views, student=student, images_per_rank=images_per_rank)
        prototypes, scale = self.config.prototypes, self.config.prototype_scale
        mlp_head = MlpHead(config.mlp_head, shapes.pooled_width, prototypes, scale)
        t_head = THead(self.config.t_head, shapes, self.views.global_crops.size_px, prototypes, scale)
        return Network(backbone, mlp_head, t_head)

    @torch.no_grad()
    def teach(self, branches: Sequence[TeachingBranch], views: Sequence[Tensor], epoch: int) -> Teachers:
        """What all teachers say of the global views, the first group."""
        with self._beside.begin():
            return self._teachers(branches, views, epoch)

    def remember(self, taught: Teachers) -> None:
        """The means of the teachers' outputs, for the centres."""
        self._seen.append(taught.means)
        if dist.is_initialized():  # one collective for all centres, on its way while the step is computed
            with self._beside.begin():
                self._arriving.append(dist.all_reduce(taught.means, async_op=True))

    def constants(self, branches: Sequence[TeachingBranch], epoch: int) -> Hashable:
        """Whether prototypes learn, the temperatures, and the weights of the terms."""
        warmups = [self.config.cross_temp_warmup_epochs, *[b.config.teacher_temp_warmup_epochs for b in branches]]
        temperatures = [self._temperature(epoch, warmup) for warmup in warmups]
        weights = [tuple(self._weights(b.config, epoch).values()) for b in branches]
        return epoch >= self.frozen_epochs, *temperatures, *weights

    def loss(
        self, branch: Branch, branches: Sequence[TeachingBranch], taught: Teachers, views: Sequence[Tensor], epoch: int
    ) -> BranchLoss:
        """The loss of a branch, which learns from its own teacher and from all others."""
        i, weights = branches.index(branch), self._weights(branch.config, epoch)
        own = self._temperature(epoch, branch.config.teacher_temp_warmup_epochs)
        cross = self._temperature(epoch, self.config.cross_temp_warmup_epochs)
        others = [j for j in range(len(branches)) if j != i]
        student: NetworkOutput = branch.forward_student(list(views))
        self._beside.join()
        with torch.no_grad():
            mlp = {"self_mlp": Target(taught.probabilities(i, 0, own), weights["self_mlp"])}
            if others and self._on("cross_mlp", epoch):
                probabilities = _mean([taught.probabilities(j, 0, cross) for j in others])
                same = self.config.cross_same_view
                if same:
                    probabilities = _for_all_views(probabilities, self.views.count)
                mlp["cross_mlp"] = Target(probabilities, weights["cross_mlp"], not same)
        losses = [self._head_loss(student.mlp, mlp, epoch)]
        with torch.no_grad():
            t_head = {"self_thead": Target(taught.probabilities(i, 1, own), weights["self_thead"])}
            if others and self._on("cross_search", epoch):
                first = self.views.global_crops.count
                queries = student.queries[first:]
                found = [self._search(j, branches[j], taught.outputs[j], queries, cross) for j in others]
                t_head["cross_search"] = Target(_mean(found), weights["cross_search"], False, first)
        losses.append(self._head_loss(student.t_head, t_head, epoch))
        terms = dict(zip([*mlp, *t_head], torch.cat([values for _, values in losses]), strict=True))
        pooled = student.pooled[0].detach()
        by_head = {"mlp": mlp["self_mlp"].probabilities, "t_head": t_head["self_thead"].probabilities}

        def observe() -> Observation:
            return Observation(
                features=normalized_features(pooled),
                entropies={head: entropy(p).mean(dim=0) for head, p in by_head.items()},
                mean_targets={head: p.mean(dim=(0, 1)) for head, p in by_head.items()},
                centers=dict(zip(HEADS, self.centers[i], strict=True)),
            )

        return BranchLoss(losses[0][0] + losses[1][0], terms, weights, observe)

    def _head_loss(self, output: HeadOutput, targets: dict[str, Target], epoch: int) -> tuple[Tensor, Tensor]:
        """The weighted sum of a head's terms, and the terms."""
        train, recompute = epoch >= self.frozen_epochs, self.recompute_logits
        found, temperature = list(targets.values()), self.config.student_temp
        return prototype_loss(output, found, temperature, train_prototypes=train, recompute=recompute)

    def _teachers(self, branches: Sequence[TeachingBranch], views: Sequence[Tensor], epoch: int) -> Teachers:
        cross = {self._temperature(epoch, self.config.cross_temp_warmup_epochs)}
        shared = cross if len(branches) > 1 and self._on("cross_mlp", epoch) else set()
        # nobody asks a frozen branch for targets of its own
        own = [
            set() if branch.config.frozen else {self._temperature(epoch, branch.config.teacher_temp_warmup_epochs)}
            for branch in branches
        ]
        outputs = [branch.teacher(views[:1]) for branch in branches]
        return Teachers(outputs, self.centers, [(mine | shared, mine) for mine in own])

    def _search(
        self, j: int, other: TeachingBranch, teacher: NetworkOutput, queries: Tensor, temperature: float
    ) -> Tensor:
        """What local queries `[L, B, d]` find in global view 1 of branch j's teacher: targets `[L, B, K]`."""
        rows = other.teacher.search(teacher.tokens, queries)  # type: ignore[operator]
        found = HeadOutput(rows, teacher.t_head.prototypes)
        if self.config.center_search:
            return teacher_probabilities(found.logits(), self.centers[j, 1], temperature, in_place=True)
        return softmax(found.logits(temperature))

    def _on(self, term: str, epoch: int) -> bool:
        """Whether a term counts in an epoch, for one branch or another."""
        return bool(getattr(self.config.terms, term)) and self._factor(term, epoch) > 0.0

    def _factor(self, term: str, epoch: int) -> float:
        return factor(getattr(self.config.ramps, term), epoch, self.epochs)

    def _weights(self, branch: BranchConfig, epoch: int) -> dict[str, float]:
        """Of all terms in the loss of a branch; 0 for those that are off."""
        own = {term: self._factor(term, epoch) if self._on(term, epoch) else 0.0 for term in TERMS}
        cross = branch.weight * factor(branch.weight_ramp, epoch, self.epochs)
        return {term: weight * (cross if term.startswith("cross") else 1.0) for term, weight in own.items()}

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
        """What lies over all prototypes at a time, in fp32: of every teacher its targets, of the MLP head at two
        temperatures; of one student head after another its logits, and what its queries have found.
        """
        teachers = len(self.names) * 3 * self.views.global_crops.count
        student = self.views.count + self.views.local_crops.count
        return (teachers + student) * images_per_rank * self.config.prototypes * 4


class Teachers:
    """What all teachers say of a batch. A target that several terms share is computed once.

    temperatures: those at which the targets of each branch's heads will be asked for. means: of every head's outputs
    `[branches, heads, K]`.
    """

    def __init__(
        self, outputs: Sequence[NetworkOutput], centers: Tensor, temperatures: Sequence[Sequence[set[float]]]
    ) -> None:
        self.outputs = outputs
        self._known: dict[tuple[int, int, float], Tensor] = {}
        means = []
        for i, output in enumerate(outputs):
            for h, head in enumerate((output.mlp, output.t_head)):
                logits = head.logits()
                means.append(logits.mean(dim=(0, 1)))
                wanted = sorted(temperatures[i][h])
                for temperature in wanted:
                    # the last may take the memory of the logits
                    p = teacher_probabilities(logits, centers[i, h], temperature, in_place=temperature == wanted[-1])
                    self._known[i, h, temperature] = p
        self.means = torch.stack(means).unflatten(0, (len(outputs), len(HEADS)))

    def probabilities(self, branch: int, head: int, temperature: float) -> Tensor:
        """The centred targets `[Q, B, K]` of a branch's head."""
        return self._known[branch, head, temperature]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """With several others the mean of their targets is the target of the mean loss."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(dim=0)


def _for_all_views(probabilities: Tensor, views: int) -> Tensor:
    """The mean `[V, B, K]` over teacher views `[Q, B, K]`, the same for each of V student views.

    Cross-entropy is linear in its target: this is the mean over all pairs of views.
    """
    mean = probabilities.mean(dim=0)
    if mean.device.type != "cpu":
        return mean.expand(views, *mean.shape)
    # prototype by prototype, as the compiled loss has it
    return mean.T.unsqueeze(1).expand(-1, views, -1).contiguous().permute(1, 2, 0)
