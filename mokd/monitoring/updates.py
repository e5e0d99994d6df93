"""Gradients and updates of a branch in one step, by part of its network."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mokd.optim.optimizer import BranchOptimizer


class UpdateMeter:
    """Made between taking the gradients and stepping; reads, and keeps a copy of the weights until `finish`.

    By then activations are gone, so the copy does not raise the peak of memory. Parts are the top modules of the
    network (`backbone`, `mlp_head`, ...); norms are those before clipping, over all ranks where they hold pieces.
    """

    @torch.no_grad()
    def __init__(self, optimizer: BranchOptimizer) -> None:
        self._optimizer = optimizer
        taken = optimizer.pieces_with_gradients()
        self._parts = [name.partition(".")[0] for name, _, _ in taken]
        self._sharded = [sharded for _, _, sharded in taken]
        self._weights = [p.detach() for _, p, _ in taken]
        self._before = [p.clone() for p in self._weights]
        self._gradients = torch._foreach_norm([p.grad for _, p, _ in taken if p.grad is not None]) if taken else []

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """`gradient_norm` and `update_ratio`, the length of the update over that of the weights, of the branch and
        `.../<part>`, after the optimizer's step. A collective of the ranks that hold pieces.
        """
        if not self._weights:
            return {"gradient_norm": torch.zeros((), dtype=torch.float64, device=self._optimizer.device)}
        torch._foreach_sub_(self._before, self._weights)
        norms = (self._gradients, torch._foreach_norm(self._before), torch._foreach_norm(self._weights))
        self._before.clear()
        squares = list(torch.stack([torch.stack(list(values)).double() for values in norms]).square().unbind(dim=1))
        if held := [i for i, sharded in enumerate(self._sharded) if sharded]:
            everywhere = torch.stack([squares[i] for i in held])
            dist.all_reduce(everywhere, group=self._optimizer.shard_group)
            for i, sums in zip(held, everywhere.unbind(), strict=True):
                squares[i] = sums
        parts = list(dict.fromkeys(self._parts))
        found: dict[str, Tensor] = {}
        for part in ["", *parts] if len(parts) > 1 else [""]:
            own = [square for square, name in zip(squares, self._parts, strict=True) if part in ("", name)]
            gradient, update, weight = torch.stack(own).sum(dim=0).sqrt().unbind()
            suffix = f"/{part}" if part else ""
            found[f"gradient_norm{suffix}"] = gradient
            found[f"update_ratio{suffix}"] = update / weight.clamp_min(1e-30)
        return found
