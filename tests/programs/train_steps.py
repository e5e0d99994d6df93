"""Five training steps in float64 on given images, in this rank; the first rank writes the state it ends in.

usage: python -m tests.programs.train_steps OUTPUT.safetensors dino|contrastive [key=value of `parallel` ...]
"""

from __future__ import annotations

import sys

import torch
import yaml
from safetensors.torch import save_file

from mokd import state
from mokd.distributed import barrier, join, leave, pick_device, ranks_from_environment
from mokd.objective import build_objective
from mokd.optim import BranchOptimizer
from mokd.parallel import parallelise
from mokd.train import leave_at_once
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, tiny_config

BATCH, STEPS = 12, 5


def main(output: str, objective_kind: str, *parallel: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    device = pick_device(ranks)
    join(ranks, device, 240)
    resnet = {**RESNET, "mlp_head": {**RESNET["mlp_head"], "batch_norm": True}}
    config = tiny_config(
        branches=[resnet, VIT, THIRD],
        optim__freeze_last_layer_epochs=0,
        optim__warmup_epochs=0,
        **(CONTRASTIVE if objective_kind == "contrastive" else {}),
        optim__clip_grad_norm=0.05,  # low enough to act
        **{f"parallel__{key}": yaml.safe_load(value) for key, value in (item.split("=") for item in parallel)},
    )
    objective = build_objective(config, device)
    objective.load_state_tensors({key: t.double() for key, t in objective.state_tensors().items()})
    own = BATCH // ranks.world_size
    branches = []
    for i, branch_config in enumerate(config.branches):
        torch.manual_seed(i)
        branch = objective.build_branch(branch_config, own)
        parallelise(branch, config.parallel, config.precision, device)
        branch.optimizer = BranchOptimizer(branch.student, branch_config, config.optim, 1.0, 5)
        branches.append(branch)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        groups = [(group.count, group.size_px) for group in config.views.groups]
        views = [torch.randn(v, BATCH, 3, s, s, generator=generator) for v, s in groups]
        mine = [view[:, ranks.rank * own : (ranks.rank + 1) * own] for view in views]
        torch.manual_seed(100 + step)  # stochastic depth
        for branch, loss in zip(branches, objective.losses(branches, mine, 0), strict=True):
            loss.total.backward()
            branch.finish_gradients()
            branch.optimizer.step(step)
            branch.update_teacher(0.9)
        objective.commit()
    files = state.collect(branches, objective, main=ranks.is_main)
    if ranks.is_main:
        save_file({f"{name}/{key}": tensor for name, file in files.items() for key, tensor in file.items()}, output)
    barrier()  # nobody closes its connections while another still needs them
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_at_once(0)
