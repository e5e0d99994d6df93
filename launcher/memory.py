"""A rough estimate of the memory that a run needs on each GPU, from shapes alone: nothing is allocated."""

from __future__ import annotations

from typing import Any

from mokd.config import RunConfig

# fp32 weights and gradients of the student, weights of its teacher, and the optimiser's state beside them
BYTES_PER_PARAMETER = {"sgd": 4 + 4 + 4 + 4, "adamw": 4 + 4 + 4 + 8}
# what the layers keep beside their outputs: inputs of normalisations, dropped paths, workspaces
OVERHEAD = 1.5
CONTEXT_BYTES = 2**30


def estimate_bytes(config: RunConfig, world_size: int) -> int:
    """Bytes per GPU: weights and states of every branch, activations of the student, losses, CUDA's own."""
    import torch

    from mokd.objective import build_objective

    images = config.optim.global_batch // world_size
    element = 2 if config.precision.compute == "bf16" else 4
    total = float(CONTEXT_BYTES)
    with torch.device("meta"):
        objective = build_objective(config, torch.device("meta"))
        for branch_config in config.branches:
            # evaluation mode: the random layers change nothing about the sizes
            student = objective.build_branch(branch_config, images).student.eval()
            parameters = sum(parameter.numel() for parameter in student.parameters())
            total += parameters * BYTES_PER_PARAMETER[branch_config.optimizer.kind]
            for group in config.views.groups:
                outputs = _output_elements(student.backbone, images, group.size_px)
                total += outputs * group.count * element * OVERHEAD
        total += objective.loss_bytes(images)
    return int(total)


def _output_elements(backbone: Any, images: int, size_px: int) -> int:
    """Elements in the outputs of all layers for one view of `images` images."""
    import torch

    counted = 0

    def count(module: Any, inputs: object, output: object) -> None:
        nonlocal counted
        if isinstance(output, torch.Tensor):
            counted += output.numel()

    leaves = [module for module in backbone.modules() if not list(module.children())]
    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        backbone(torch.empty(images, 3, size_px, size_px, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return counted
