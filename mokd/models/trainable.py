"""What parallelism and optimisation have to know of a branch's network, whatever the objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import nn

from mokd.models.backbones import Backbone


class Units(NamedTuple):
    """The modules that are sharded by themselves; `exact` ones compute in fp32 or better, whatever the precision."""

    half: list[nn.Module]
    exact: list[nn.Module]


class TrainableNetwork(nn.Module, ABC):
    """A backbone with what an objective puts on it."""

    backbone: Backbone
    # whether the teachers of branches that learn are run while training, so that their BatchNorm sees batches
    sees_batches = True

    @abstractmethod
    def units(self) -> Units:
        """The units of sharding, the inner ones; what is left over is sharded with the whole."""

    def is_last_layer(self, parameter: str) -> bool:
        """Whether a parameter, by its name, is of the layers that `optim.freeze_last_layer_epochs` freezes."""
        return False

    def in_t_head(self, parameter: str) -> bool:
        """Whether a parameter, by its name, follows the branch's `t_head_group` where there is one."""
        return False
