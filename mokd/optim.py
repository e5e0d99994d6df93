"""Parameter groups, their schedules, clipping and the freeze of the last layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mokd.config import BranchConfig, GroupConfig, OptimConfig
from mokd.network import is_last_layer
from mokd.schedules import cosine, warmup_cosine


class BranchOptimizer:
    """One branch's optimiser with scheduled groups: `decay`, `no_decay` and, where configured, the T-Head's own."""

    def __init__(self, student: nn.Module, branch: BranchConfig, optim: OptimConfig, lr_scale: float, epoch_steps: int):
        self._optim = optim
        self._lr_scale = lr_scale
        self._epoch_steps = epoch_steps
        self._steps = optim.epochs * epoch_steps
        self._named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self._last_layers = [p for name, p in self._named if is_last_layer(name)]
        groups = list(_groups(self._named, branch))
        # on CPUs fused kernels, which read and write everything once: 3 (SGD) to 7 (AdamW) times as fast as foreach
        on_cpu = all(p.device.type == "cpu" for _, p in self._named)
        options: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "fused" if on_cpu else "foreach": True}
        config = branch.optimizer
        if config.kind == "sgd":
            self.torch: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=config.momentum, **options)
        else:
            self.torch = torch.optim.AdamW(groups, betas=config.betas, **options)

    def step(self, step: int) -> float:
        """Clips, freezes, sets the rates of this step, updates the parameters, drops the gradients.

        Returns the learning rate of the branch's main groups.
        """
        optim = self._optim
        if optim.clip_grad_norm is not None:
            clip_each([p.grad for _, p in self._named if p.grad is not None], optim.clip_grad_norm)
        if step < optim.freeze_last_layer_epochs * self._epoch_steps:
            for parameter in self._last_layers:
                parameter.grad = None  # a parameter without gradient gets no decay and no momentum either
        self.schedule(step)
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        return float(self.torch.param_groups[0]["lr"])

    def schedule(self, step: int) -> None:
        """Sets every group's learning rate and weight decay to those of `step`."""
        warmup = round(self._optim.warmup_epochs * self._epoch_steps)
        for group in self.torch.param_groups:
            config: GroupConfig = group["schedule"]
            group["lr"] = warmup_cosine(step, self._steps, warmup, config.lr * self._lr_scale, config.min_lr)
            group["weight_decay"] = cosine(step, self._steps, *config.decay_range) if group["decayed"] else 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as `<parameter>/<entry>` tensors, by parameter name, not by position."""
        state = self.torch.state
        return {
            f"{name}/{entry}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, p in self._named
            for entry, value in state.get(p, {}).items()
            if value is not None
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        by_name = dict(self._named)
        self.torch.state.clear()
        for key, value in tensors.items():
            name, entry = key.rsplit("/", 1)
            p = by_name[name]
            # the step count of AdamW stays on the CPU, everything else lives beside its parameter
            place = value.clone() if value.ndim == 0 else value.to(p.device, copy=True)
            self.torch.state[p][entry] = place


def _groups(named: list[tuple[str, nn.Parameter]], branch: BranchConfig) -> Iterable[dict[str, Any]]:
    t_head = branch.t_head_group
    if t_head is None:
        yield from _by_decay(named, branch.optimizer)
    else:
        own = [(name, p) for name, p in named if name.startswith("t_head.")]
        rest = [(name, p) for name, p in named if not name.startswith("t_head.")]
        yield from _by_decay(rest, branch.optimizer)
        yield from _by_decay(own, t_head)


def _by_decay(named: list[tuple[str, nn.Parameter]], schedule: GroupConfig) -> Iterable[dict[str, Any]]:
    def plain(name: str, p: nn.Parameter) -> bool:
        return not schedule.decay_all and (p.ndim <= 1 or name.endswith(".bias"))

    for decayed in (True, False):
        params = [p for name, p in named if plain(name, p) is not decayed]
        if params:
            yield {"params": params, "schedule": schedule, "decayed": decayed}


@torch.no_grad()
def clip_each(gradients: list[Tensor], limit: float) -> None:
    """Scales every gradient whose own norm exceeds `limit` down to it, without reading a norm on the host."""
    if not gradients:
        return
    factors = [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
    torch._foreach_mul_(gradients, factors)
