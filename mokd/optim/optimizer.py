"""Parameter groups, their schedules, clipping and the freeze of the last layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm.models import group_parameters
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from mokd.config import BranchConfig, GroupConfig, OptimConfig, OptimizerConfig
from mokd.distributed.host_copy import constant
from mokd.distributed.sharding import assemble, is_sharded, own_rows, piece, shard_group
from mokd.models.trainable import TrainableNetwork
from mokd.optim.schedules import cosine, warmup_cosine

_LARGE_ELEMENTS = 1 << 20  # of a gradient that is worth a launch of its own on a GPU


class BranchOptimizer:
    """One branch's optimiser with scheduled groups: `decay`, `no_decay` and, where configured, the T-Head's own."""

    def __init__(
        self, student: TrainableNetwork, branch: BranchConfig, optim: OptimConfig, lr_scale: float, epoch_steps: int
    ) -> None:
        self._is_last_layer = student.is_last_layer
        self._optim = optim
        self._frozen_backbone_steps = branch.freeze_backbone_epochs * epoch_steps
        self._lr_scale = lr_scale
        self._epoch_steps = epoch_steps
        self._steps = optim.epochs * epoch_steps
        self._registered = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.shard_group = shard_group(self._registered.values())
        # what is optimised: the parameters themselves, or this rank's pieces of them
        own = {name: nn.Parameter(piece(p)) if is_sharded(p) else p for name, p in self._registered.items()}
        self._named = list(own.items())
        groups = list(_groups(self._named, branch, student))
        self._main = config = branch.own_optimizer
        # the fused optimisers read and write everything once: on CPUs several times as fast as foreach
        fused = all(p.device.type in ("cpu", "cuda") for _, p in self._named)
        options: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "fused" if fused else "foreach": True}
        if config.kind == "sgd":
            self.torch: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=config.momentum, **options)
        else:
            self.torch = torch.optim.AdamW(groups, betas=config.betas, **options)

    def take_gradients(self, step: int) -> list[Tensor]:
        """This rank's pieces of the gradients that `step` will use, to be looked at or changed in place.

        Those of frozen layers are dropped: a parameter without gradient gets no decay and no momentum either.
        """
        last_layers = step < self._optim.freeze_last_layer_epochs * self._epoch_steps
        backbone = step < self._frozen_backbone_steps
        for name, p in self._named:
            gradient = self._registered[name].grad
            frozen = (last_layers and self._is_last_layer(name)) or (backbone and in_backbone(name))
            p.grad = None if gradient is None or frozen else piece(gradient)
        return [p.grad for _, p in self._named if p.grad is not None]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._named[0][1].device

    def pieces_with_gradients(self) -> list[tuple[str, nn.Parameter, bool]]:
        """Name, this rank's piece and whether others have more of it, for every parameter whose gradient was taken."""
        return [(name, p, is_sharded(self._registered[name])) for name, p in self._named if p.grad is not None]

    def step(self, step: int) -> float:
        """Clips the gradients taken, sets this step's rates, updates the parameters, drops the gradients.

        `take_gradients` comes first. Returns the branch's learning rate, without the factors of layers.
        """
        if self._optim.clip_grad_norm is not None:
            self._clip(self._optim.clip_grad_norm)
        rate = self.schedule(step)
        self.torch.step()
        self.drop_gradients()
        return rate

    def drop_gradients(self) -> None:
        """Forgets all gradients."""
        for name, p in self._named:
            p.grad = self._registered[name].grad = None

    def _clip(self, limit: float) -> None:
        given = [(self._registered[name], p.grad) for name, p in self._named if p.grad is not None]
        whole = [gradient for registered, gradient in given if not is_sharded(registered)]
        pieces = [gradient for registered, gradient in given if is_sharded(registered)]
        clip_each(whole, limit)
        clip_each(pieces, limit, self.shard_group)

    def schedule(self, step: int) -> float:
        """Sets every group's learning rate and weight decay to those of `step`; returns the branch's rate."""
        for group in self.torch.param_groups:
            config: GroupConfig = group["schedule"]
            group["lr"] = self._rate(config, step) * group["lr_factor"]
            group["weight_decay"] = cosine(step, self._steps, *config.decay_range) if group["decayed"] else 0.0
        return self._rate(self._main, step)

    def _rate(self, config: GroupConfig, step: int) -> float:
        warmup = round(self._optim.warmup_epochs * self._epoch_steps)
        return warmup_cosine(step, self._steps, warmup, config.lr * self._lr_scale, config.min_lr)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as `<parameter>/<entry>` tensors, by parameter name, not by position."""
        tensors = {}
        for name, p in self._named:
            for entry, value in self.torch.state.get(p, {}).items():
                if value is not None:
                    value = value if isinstance(value, Tensor) else torch.tensor(value)
                    tensors[f"{name}/{entry}"] = assemble(value, self._registered[name]) if value.ndim else value
        return tensors

    def load_state_tensors(self, keys: Iterable[str], read: Callable[[str, slice | None], Tensor]) -> None:
        """Restores what `state_tensors` gave: `read(key, rows)` gives a saved tensor, or some rows of it."""
        by_name = dict(self._named)
        self.torch.state.clear()
        for key in keys:
            name, entry = key.rsplit("/", 1)
            p = by_name[name]
            value = read(key, own_rows(self._registered[name]))
            # everything lives beside its parameter, laid out alike; the fused AdamW wants its step count there too
            here = value.clone().to(p.device) if value.ndim == 0 else torch.empty_like(p).copy_(value)
            self.torch.state[p][entry] = here


Named = list[tuple[str, nn.Parameter]]


def _groups(named: Named, branch: BranchConfig, student: TrainableNetwork) -> Iterable[dict[str, Any]]:
    t_head, factors = branch.t_head_group, layer_factors(student, branch.own_optimizer, f"branches.{branch.name}")
    # what is frozen at first has groups of its own: after the freeze it has no momentum yet when all others have, and
    # the fused SGD takes either kind, not both at once
    freezes = branch.freeze_backbone_epochs > 0
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, p in named:
        in_t_head = t_head is not None and student.in_t_head(name)
        schedule = t_head if t_head is not None and in_t_head else branch.own_optimizer
        decayed = schedule.decay_all or not (p.ndim <= 1 or name.endswith(".bias"))
        factor = factors.get(name, 1.0)
        key = (in_t_head, student.is_last_layer(name), not decayed, freezes and in_backbone(name), factor)
        group = {"params": [], "schedule": schedule, "decayed": decayed, "lr_factor": factor}
        groups.setdefault(key, group)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def in_backbone(parameter: str) -> bool:
    """Whether a parameter, by its name, is of the backbone that `branches.N.freeze_backbone_epochs` freezes."""
    return parameter.startswith("backbone.")


def layer_factors(student: TrainableNetwork, config: OptimizerConfig, owner: str) -> dict[str, float]:
    """The factor on the rate of every parameter of the backbone: `backbone_lr_factor * layer_decay ** d`.

    d is the number of layers from a parameter's up to the heads, which have factor 1: 1 for the last block, one more
    for each block below it, most for the stem (BEiT, arXiv 2106.08254, appendix; timm counts the layers). Empty where
    no factor is asked for; UserError where timm cannot tell the layers of a network apart.
    """
    factor, decay = config.backbone_lr_factor, config.layer_decay
    if factor == decay == 1.0:
        return {}
    net: Any = student.backbone.net
    names = [name for name, _ in net.named_parameters()]
    distances = dict.fromkeys(names, 0)
    if decay != 1.0:
        if not hasattr(net, "group_matcher"):
            raise UserError(f"{owner}.optimizer.layer_decay: timm does not tell the layers of this network apart")
        layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        top = max(layers.values()) + 1
        distances = {name: top - layer for name, layer in layers.items()}
    return {f"backbone.net.{name}": factor * decay**distance for name, distance in distances.items()}


@torch.no_grad()
def clip_each(gradients: list[Tensor], limit: float, group: dist.ProcessGroup | None = None) -> None:
    """Scales every gradient whose own norm exceeds `limit` down to it, without reading a norm on the host.

    With a `group`, the tensors are this rank's pieces of gradients that its ranks hold together; their squared norms
    are summed up in one collective.
    """
    if not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients))
    if group is not None:
        squares = norms.square()
        dist.all_reduce(squares, group=group)
        norms = squares.sqrt()
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    if norms.device.type == "cpu":  # where nothing has to wait for a number, most gradients can be left alone
        pairs = [(g, factor) for g, factor in zip(gradients, factors.unbind(), strict=True) if factor < 1.0]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))
        return
    scale_each(gradients, factors)


def scale_each(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiplies every tensor by its own of the factors `[n]`, in place, in few launches and without host reads.

    By a number of the device each would take a launch of its own, also within `torch._foreach_mul_`. So small ones are
    put into one flat tensor and copied back.
    """
    small = [i for i, tensor in enumerate(tensors) if tensor.numel() < _LARGE_ELEMENTS]
    for tensor, factor in zip(tensors, factors.unbind(), strict=True):
        if tensor.numel() >= _LARGE_ELEMENTS:
            tensor.mul_(factor)
    if not small:
        return
    lines = [_in_memory_order(tensors[i]) for i in small]
    sizes = tuple(line.numel() for line in lines)
    flat = torch.cat(lines)
    counts, chosen = (constant(numbers, torch.int64, flat.device) for numbers in (sizes, tuple(small)))
    flat *= factors[chosen].to(flat.dtype).repeat_interleave(counts, output_size=flat.numel())  # no wait for the sum
    torch._foreach_copy_(lines, list(flat.split(sizes)))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements as they lie, `[n]`, sharing memory; in channels-last order too."""
    return tensor.as_strided((tensor.numel(),), (1,))
