"""Which prototypes of the branches stand for the same images, found once, when a cross term begins to count.

Nothing is moved in a network. Every branch keeps its prototypes in their order, with centres, averages and the
optimizer's state; what is permuted is a target on its way from one branch to another. That is the cross term that
permuting all of these would give, while the branches' own terms stay the same bits, whoever holds which part of them.

Shape letters: N branches, H heads, K prototypes, Q teacher views, B images per rank, R rows (views of images) of a step
over all ranks, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.core.errors import UserError
from mokd.distributed.process_group import all_gather, decided_by_main


class PrototypeMatching:
    """Collects which prototype every teacher puts an image to, and matches by that, once for each head.

    orders `[N, H, K]`: which prototype of a branch stands for prototype k of the first branch. The same on all ranks.
    """

    def __init__(
        self, names: Sequence[str], heads: Sequence[str], prototypes: int, steps: int, device: torch.device
    ) -> None:
        if find_spec("scipy") is None:
            raise UserError("objective.match_prototypes: needs SciPy: pip install 'mokd[matching]'")
        self.names, self.heads, self.prototypes, self.steps = list(names), list(heads), prototypes, steps
        shape = (len(names), len(heads), prototypes)
        self.orders = torch.arange(prototypes, dtype=torch.int32, device=device).expand(shape).clone()
        self.done = [False] * len(heads)
        self._recent = torch.empty(0, *shape[:2], 0, dtype=torch.int32, device=device)  # [S, N, H, R]
        self._seen: list[Tensor] = []  # of the micro-batches of this step
        self._places: dict[tuple[int, int, int], Tensor] = {}

    @property
    def collects(self) -> bool:
        """Whether a head is still to be matched."""
        return not all(self.done)

    def remember(self, assigned: Tensor) -> None:
        """Takes notice of a micro-batch: the prototype `[N, H, Q, B]` with the largest centred logit."""
        self._seen.append(assigned)

    @torch.no_grad()
    def commit(self) -> None:
        """Adds the step to the recent ones, in one collective; the oldest makes room."""
        if not self._seen:
            return
        everywhere = all_gather(torch.cat(self._seen, dim=-1).to(torch.int32))  # [W, N, H, Q, B]
        step = everywhere.movedim(0, 2).flatten(2).unsqueeze(0)
        self._recent = torch.cat([self._recent, step] if len(self._recent) else [step])[-self.steps :]
        self._seen.clear()

    @torch.no_grad()
    def match(self, head: int) -> None:
        """Matches a head by what has been seen, unless that was done before; a collective of all ranks.

        Where nothing has been seen, prototype k stands for prototype k.
        """
        if self.done[head]:
            return
        self.done[head] = True
        if len(self._recent):
            rows = self._recent[:, :, head].transpose(0, 1).flatten(1).cpu().numpy()  # [N, S * R]
            found = decided_by_main(lambda: [best_order(co_assignment(rows[0], r, self.prototypes)) for r in rows[1:]])
            for branch, order in enumerate(found, start=1):
                self.orders[branch, head].copy_(torch.from_numpy(order))
            self._places.clear()
        if not self.collects:
            self._recent = self._recent[:0]

    def translate(self, probabilities: Tensor, giver: int, taker: int, head: int) -> Tensor:
        """Probabilities `[..., K]` over a branch's prototypes as probabilities over another's.

        On CPUs they come out prototype by prototype in memory, as the compiled loss has them.
        """
        if giver == taker or not self.done[head]:
            return probabilities
        place = self._place(giver, taker, head)
        if probabilities.device.type == "cpu":
            return probabilities.movedim(-1, 0).index_select(0, place).movedim(0, -1)
        return probabilities.index_select(-1, place)

    def _place(self, giver: int, taker: int, head: int) -> Tensor:
        """`[K]`: the giver's prototype for each of the taker's."""
        key = (giver, taker, head)
        if key not in self._places:
            orders = self.orders[:, head].long()
            self._places[key] = orders[giver, orders[taker].argsort()]
        return self._places[key]

    def state_tensors(self) -> dict[str, Tensor]:
        """The orders, which heads are matched, and while one is not, what has been seen."""
        orders = {
            f"order/{name}/{head}": self.orders[n, h]
            for n, name in enumerate(self.names)
            for h, head in enumerate(self.heads)
        }
        return {**orders, "matched": torch.tensor(self.done, dtype=torch.int32, device="cpu"), "assigned": self._recent}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave."""
        for key, order in self.state_tensors().items():
            if key.startswith("order/"):
                order.copy_(tensors[key])
        self.done = [bool(done) for done in tensors["matched"].tolist()]
        self._recent = tensors["assigned"].to(self._recent)
        self._places.clear()


def co_assignment(first: NDArray[np.int32], second: NDArray[np.int32], prototypes: int) -> NDArray[np.int64]:
    """How often `[K, K]` a row is put to prototype a by one branch and b by another, for their choices `[R]`."""
    pairs = first.astype(np.int64) * prototypes + second
    return np.bincount(pairs, minlength=prototypes * prototypes).reshape(prototypes, prototypes)


def best_order(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The permutation `[K]` with the largest sum of `counts[k, order[k]]` (the Hungarian algorithm).

    Among equals one that leaves most in place: what is never used stays where it is.
    """
    from scipy.optimize import linear_sum_assignment

    count = len(counts)
    # whole numbers: a row that agrees weighs more than all K places together
    worth = counts.astype(np.float64) * (count + 1)
    worth[np.diag_indices(count)] += 1.0
    return linear_sum_assignment(worth, maximize=True)[1].astype(np.int32)
