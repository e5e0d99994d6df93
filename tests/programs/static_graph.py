"""A layer frozen in the first steps takes part afterwards, over gloo: under DDP with the flags that GPUs get, or with
gradients averaged after the passes, as where these are CUDA graphs.

usage: python -m tests.programs.static_graph ddp|after OUTPUT.safetensors    (in every rank)
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mokd.distributed.process_group import barrier, join, leave, ranks_from_environment
from mokd.losses.kernels.targets import Target
from mokd.losses.prototype_loss import prototype_loss
from mokd.losses.prototypes import HeadOutput, Prototypes
from mokd.parallel.parallelize import average_gradients, ddp_options
from mokd.training.entry import leave_at_once

FROZEN_STEPS, STEPS, BATCH = 2, 5, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(4, 4), Prototypes(4, 6, train_gain=True)

    def forward(self, x: torch.Tensor) -> HeadOutput:
        return HeadOutput(self.body(x).tanh().unsqueeze(0), self.last())


def main(way: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    ranks = ranks_from_environment()
    join(ranks, torch.device("cpu"), 60)
    net = Net()
    several, after = ranks.world_size > 1, way == "after"
    under_ddp = several and not after
    call = DistributedDataParallel(net, **ddp_options(on_gpu=True, accumulate=False)) if under_ddp else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    own = BATCH // ranks.world_size
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        mine = slice(ranks.rank * own, (ranks.rank + 1) * own)
        x = torch.randn(BATCH, 4, generator=generator)[mine]
        targets = [Target(torch.randn(1, BATCH, 6, generator=generator).softmax(-1)[:, mine], 1.0, paired=False)]
        frozen = step < FROZEN_STEPS
        loss, _ = prototype_loss(call(x), targets, 0.1, train_prototypes=not frozen)
        loss.backward()
        if several and after:
            average_gradients(list(net.parameters()))
        if frozen:  # as the optimizer's `take_gradients` does
            net.last.direction.grad = net.last.gain.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ranks.is_main:
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, output)
    barrier()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_at_once(0)
