"""The plain step: the method word for word, in stock eager PyTorch. The contender of `mokd bench step`.

The same networks, the same mathematics, the same numbers; but the losses of `mokd.losses.reference`, a log-softmax for
every pair of views, the weight norm wherever a head is used, a centre for every loss, the searched map repeated for
every local view before its projection, and loops over parameters, with a host read each, for clipping and averaging.

Shape letters: V student views, Q teacher views, L local views, B images, N tokens, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step_ours import Pair
from mokd.losses.prototypes import Prototypes
from mokd.losses.reference import paired_cross_entropy, row_cross_entropy, teacher_targets
from mokd.models.backbones import Features
from mokd.objectives.branch import Branch
from mokd.objectives.dino_network import Network
from mokd.optim.schedules import teacher_temperature
from mokd.training.step import seed_branch


class PlainStep:
    """One process, any number of branches."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.config = pair, pair.config
        count, prototypes = len(pair.branches), self.config.objective.prototypes
        device = pair.device
        for network in (network for branch in pair.branches for network in (branch.student, branch.teacher)):
            network.backbone.channels_last = False
            network.backbone.to(memory_format=torch.contiguous_format)
        # one centre per loss: self MLP, self T-Head, and the cross MLP of every ordered pair of branches
        self.self_centers = [[torch.zeros(prototypes, device=device) for _ in range(2)] for _ in range(count)]
        self.cross_centers = {
            (i, j): torch.zeros(prototypes, device=device) for i in range(count) for j in range(count) if i != j
        }
        self.optimizers = [_stock_optimizer(branch) for branch in pair.branches]

    def __call__(self, views: Sequence[Tensor], step: int) -> list[dict[str, float]]:
        """One step; every term of every branch."""
        branches = self.pair.branches
        with self.pair.autocast():
            students = [self._student(branch, views, step) for branch in branches]
            with torch.no_grad():
                teachers = [self._outputs(branch.teacher, views[:1]) for branch in branches]
            losses = [self._terms(i, students, teachers) for i in range(len(branches))]
        read = []
        for branch, terms in zip(branches, losses, strict=True):
            weight = branch.config.weight
            total = sum(value * (weight if name.startswith("cross") else 1.0) for name, value in terms.items())
            if not math.isfinite(total.item()):
                raise RuntimeError(f"loss of {branch.name} is {total.item()}")
            total.backward()
            read.append({"total": total.item(), **{name: value.item() for name, value in terms.items()}})
        for branch, optimizer in zip(branches, self.optimizers, strict=True):
            _clip(branch.student, self.config.optim.clip_grad_norm)
            branch.optimizer.schedule(step)
            optimizer.step()
            optimizer.zero_grad()
            _average(branch, self.pair.momentum(step))
        return read

    def _student(self, branch: Branch, views: Sequence[Tensor], step: int) -> dict[str, Any]:
        seed_branch(self.config.seed, step, branch.name)  # stochastic depth draws the same in both contenders
        return self._outputs(branch.student, views)

    def _outputs(self, network: Network, views: Sequence[Tensor]) -> dict[str, Any]:
        batch = views[0].shape[1]
        features: list[Features] = [network.backbone(group.flatten(0, 1)) for group in views]
        mlp = _head(network.mlp_head(torch.cat([f.pooled for f in features])), network.mlp_head.last_layer)
        dense, queries = [], []
        for f in features:
            tokens, query = network.t_head.embed(f)
            dense.append(_head(network.t_head(tokens), network.t_head.last_layer))
            queries.append(query)
        return {
            "mlp": mlp.unflatten(0, (-1, batch)),
            "t_head": torch.cat(dense).unflatten(0, (-1, batch)),
            "queries": torch.cat(queries).unflatten(0, (-1, batch)),
            "map": features[0].tokens[:batch],
        }

    def _terms(self, i: int, students: list[dict], teachers: list[dict]) -> dict[str, Tensor]:
        branch, student = self.pair.branches[i], students[i]
        objective = self.config.objective
        own, cross = (
            teacher_temperature(self.pair.epoch, epochs, *objective.teacher_temp)
            for epochs in (branch.config.teacher_temp_warmup_epochs, objective.cross_temp_warmup_epochs)
        )
        mlp_center, thead_center = self.self_centers[i]
        terms = {
            "self_mlp": self._paired(student["mlp"], teachers[i]["mlp"], mlp_center, own),
            "self_thead": self._paired(student["t_head"], teachers[i]["t_head"], thead_center, own),
        }
        others = [j for j in range(len(students)) if j != i]
        if others:
            paired = [self._paired(student["mlp"], teachers[j]["mlp"], self.cross_centers[i, j], cross) for j in others]
            found = [self._searched(student, self.pair.branches[j], teachers[j], cross) for j in others]
            terms["cross_mlp"] = sum(paired) / len(others)
            terms["cross_search"] = sum(found) / len(others)
        return terms

    def _paired(self, student: Tensor, teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
        """The DINO loss `H(teacher, student)`, and its centre's update."""
        targets = teacher_targets(teacher.float(), center, temperature)
        loss = paired_cross_entropy(student.float(), targets, self._student_temp)
        center.lerp_(teacher.float().mean(dim=(0, 1)), 1.0 - self.config.objective.center_momentum)
        return loss

    def _searched(self, student: dict, other: Branch, teacher: dict, temperature: float) -> Tensor:
        first = self.config.views.global_crops.count
        queries = student["queries"][first:]
        count, batch = queries.shape[:2]
        with torch.no_grad():
            head = other.teacher.t_head
            maps = teacher["map"].repeat(count, 1, 1)
            tokens, _ = head.embed(Features(maps[:, 0], maps, None))
            found = _head(head(tokens, queries.flatten(0, 1)), head.last_layer).unflatten(0, (count, batch))
            targets = teacher_targets(found.float(), None, temperature)
        return row_cross_entropy(student["t_head"][first:].float(), targets, self._student_temp)

    @property
    def _student_temp(self) -> float:
        return self.config.objective.student_temp


def _head(rows: Tensor, last_layer: Prototypes) -> Tensor:
    return F.linear(rows, torch._weight_norm(last_layer.direction, last_layer.gain, 0))


def _stock_optimizer(branch: Branch) -> torch.optim.Optimizer:
    """The same groups in an optimiser with its default settings."""
    config, groups = branch.config.own_optimizer, branch.optimizer.torch.param_groups
    bare = [{"params": group["params"]} for group in groups]
    if config.kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(bare, lr=0.0, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(bare, lr=0.0, betas=config.betas)
    for mine, theirs in zip(optimizer.param_groups, groups, strict=True):
        mine.update(schedule=theirs["schedule"], decayed=theirs["decayed"], lr_factor=theirs["lr_factor"])
    branch.optimizer.torch = optimizer  # which the schedule is set on
    return optimizer


def _clip(student: Network, limit: float | None) -> None:
    for p in student.parameters():
        if limit is not None and p.grad is not None:
            coefficient = limit / (p.grad.norm(2).item() + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)


@torch.no_grad()
def _average(branch: Branch, momentum: float) -> None:
    for student, teacher in zip(branch.student.parameters(), branch.teacher.parameters(), strict=True):
        teacher.data.mul_(momentum).add_((1.0 - momentum) * student.detach().data)
