"""What parallelism and optimisation have to know of a branch's network, whatever the objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from mokd.models.backbones import Backbone
from mokd.models.lent_weights import LentWeights


class Units(NamedTuple):
    """The modules that are sharded by themselves; `exact` ones compute in fp32 or better, whatever the precision."""

    half: list[nn.Module]
    exact: list[nn.Module]


class TrainableNetwork(nn.Module, ABC):
    """A backbone with what an objective puts on it."""

    backbone: Backbone
    # whether the teachers of branches that learn are run while training, so that their BatchNorm sees batches
    sees_batches = True
    _lent: LentWeights | None = None

    def lend_weights(self) -> None:
        """From now on calls that ask `calls` cast the weights for half precision together; the bits stay the same.

        After everything that replaces modules.
        """
        self._lent = LentWeights(self)

    def calls(self, count: int, part: nn.Module, device: torch.device) -> list[AbstractContextManager[None]]:
        """What each of so many calls of `part`, or of parts of it, is to run in; each may be entered again."""
        return [nullcontext()] * count if self._lent is None else self._lent.calls(count, part, device)

    @abstractmethod
    def units(self) -> Units:
        """The units of sharding, the inner ones; what is left over is sharded with the whole."""

    def is_last_layer(self, parameter: str) -> bool:
        """Whether a parameter, by its name, is of the layers that `optim.freeze_last_layer_epochs` freezes."""
        return False

    def in_t_head(self, parameter: str) -> bool:
        """Whether a parameter, by its name, follows the branch's `t_head_group` where there is one."""
        return False
