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
    """Bytes per GPU: weights and states of every branch, activations of the student, losses, CUDA's own.

    Under FSDP the states are split over the ranks that hold one copy; beside them lie the weights that are gathered at
    one time, with their gradients.
    """
    import torch

    from mokd.objectives.base import build_objective

    images = config.optim.global_batch // world_size // config.optim.accumulate
    element = 4 if config.precision.compute == "fp32" else 2
    sharded = config.parallel.strategy == "fsdp" and world_size > 1
    holders = (config.parallel.shard_group_size or world_size) if sharded else 1
    total = float(CONTEXT_BYTES)
    with torch.device("meta"):
        objective = build_objective(config, torch.device("meta"))
        for branch_config in config.branches:
            # evaluation mode: the random layers change nothing about the sizes
            student = objective.build_network(branch_config, images, student=not branch_config.frozen).eval()
            parameters = sum(parameter.numel() for parameter in student.parameters())
            if branch_config.frozen:  # weights, and activations that nobody keeps
                total += parameters * 4 / holders
                continue
            total += parameters * BYTES_PER_PARAMETER[branch_config.own_optimizer.kind] / holders
            if sharded:
                total += _gathered_bytes(student, element, config)
            for group in config.views.groups:
                recomputed = branch_config.activation_checkpointing
                outputs = _kept_elements(student.backbone, images, group.size_px, recomputed)
                total += outputs * group.count * element * OVERHEAD
        total += objective.loss_bytes(images)
    return int(total)


def _gathered_bytes(student: Any, element: int, config: RunConfig) -> float:
    """Whole weights and gradients on a rank at one time: the root's, and two blocks of those that are freed again."""

    def sizes(modules: Any) -> list[int]:
        return [sum(parameter.numel() for parameter in module.parameters()) for module in modules]

    units = student.units()
    half, exact = sizes(units.half), sizes(units.exact)
    root = sizes([student])[0] - sum(half) - sum(exact)
    # what computes exactly is gathered in fp32, the rest in the type of the arithmetic
    freed = 2 * max([*(unit * element for unit in half), *(unit * 4 for unit in exact)], default=0)
    kept = sum(half) * element + sum(exact) * 4
    return 2.0 * (4 * root + (freed if config.parallel.reshard_after_forward else kept))


def _kept_elements(backbone: Any, images: int, size_px: int, recomputed: bool) -> int:
    """Elements in the outputs of all layers for one view of `images` images.

    Where blocks are recomputed: in the outputs of blocks, and everything within the largest.
    """
    from mokd.models.blocks import repeated_blocks

    blocks = repeated_blocks(backbone) if recomputed else []
    within = {id(module): i for i, block in enumerate(blocks) for module in block.modules() if module is not block}
    inside = [0] * len(blocks)
    outside = 0
    leaves = [module for module in backbone.modules() if not list(module.children())]
    for module, count in _outputs(backbone, images, size_px, [*leaves, *blocks]):
        if id(module) in within:
            inside[within[id(module)]] += count
        else:
            outside += count
    return outside + max(inside, default=0)


def _outputs(backbone: Any, images: int, size_px: int, modules: list[Any]) -> list[tuple[Any, int]]:
    """Each of `modules` that runs, with the elements of its output, for one view of `images` images."""
    import torch

    seen: list[tuple[Any, int]] = []

    def see(module: Any, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append((module, output.numel()))

    handles = [module.register_forward_hook(see) for module in modules]
    try:
        backbone(torch.empty(images, backbone.channels, size_px, size_px, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return seen
