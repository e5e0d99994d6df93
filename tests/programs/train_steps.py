"""Two training steps in float64 on given images, in this rank; the first rank writes the state it ends in.

usage: python -m tests.programs.train_steps OUTPUT.safetensors dino|contrastive
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from mokd.config import ParallelConfig
from mokd.distributed import barrier, join, leave, pick_device, ranks_from_environment
from mokd.objective import build_objective
from mokd.optim import BranchOptimizer
from mokd.parallel import parallelise
from mokd.train import leave_at_once
from tests.support import CONTRASTIVE, RESNET, THIRD, VIT, tiny_config

BATCH, STEPS = 12, 2


def main(output: str, objective_kind: str) -> None:
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
    )
    objective = build_objective(config, device)
    objective.load_state_tensors({key: t.double() for key, t in objective.state_tensors().items()})
    own = BATCH // ranks.world_size
    branches = []
    for i, branch_config in enumerate(config.branches):
        torch.manual_seed(i)
        branch = objective.build_branch(branch_config, own)
        parallelise(branch, ParallelConfig(), device)
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
            branch.optimizer.step(step)
            branch.update_teacher(0.9)
        objective.commit()
    if ranks.is_main:
        state = {f"{b.name}/student/{k}": v for b in branches for k, v in b.student.state_dict().items()}
        state |= {f"{b.name}/teacher/{k}": v for b in branches for k, v in b.teacher.state_dict().items()}
        save_file({k: v.contiguous().clone() for k, v in {**state, **objective.state_tensors()}.items()}, output)
    barrier()  # nobody closes its connections while another still needs them
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    leave_at_once(0)
