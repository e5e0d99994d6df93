from __future__ import annotations

from launcher.preflight.memory import CONTEXT_BYTES, estimate_bytes
from tests.support import CONTRASTIVE, RESNET, VIT, frozen, tiny_config

# large enough for weights to matter beside a step's activations
WIDE = {**VIT, "backbone": "vit_small_patch16_224", "backbone_options": {"depth": 12}}
COMMON = {"optim__global_batch": 64, "views__global_crops__size_px": 64, "views__local_crops__size_px": 32}


def estimate(world_size: int = 8, branch: dict = WIDE, **changes: object) -> int:
    return estimate_bytes(tiny_config(branches=[branch, RESNET], **{**COMMON, **changes}), world_size) - CONTEXT_BYTES


def test_sharding_divides_the_state_by_the_ranks_that_share_it() -> None:
    whole = estimate()
    by_group = {size: estimate(parallel={"strategy": "fsdp", "shard_group_size": size}) for size in (2, 4, 8)}
    assert by_group[8] < by_group[4] < by_group[2] < whole
    # each doubling of the group saves half of what is left of the divided part
    assert (by_group[2] - by_group[4]) // 1000 == 2 * (by_group[4] - by_group[8]) // 1000
    kept = estimate(parallel={"strategy": "fsdp", "reshard_after_forward": False})
    assert by_group[8] < kept


def test_micro_batches_and_recomputation_cost_less_activation_memory() -> None:
    whole, halves = estimate(), estimate(optim__accumulate=4)
    assert halves < whole
    assert estimate(branch={**WIDE, "activation_checkpointing": True}) < whole
    assert estimate(precision={"compute": "fp16"}) == estimate(precision={"compute": "bf16"}) < whole


def test_a_frozen_branch_costs_its_weights_alone() -> None:
    learning, alone = estimate(), estimate_bytes(tiny_config(branches=[RESNET], **COMMON), 8) - CONTEXT_BYTES
    still = estimate(branch=frozen(WIDE))
    # of four to five numbers for every parameter one is left, and nothing is kept for a backward pass
    assert alone < still < alone + (learning - alone) / 4


def test_a_sharded_contrastive_run_is_estimated_too() -> None:
    contrastive = {**CONTRASTIVE, "objective__bank__size": 256}
    whole, sharded = estimate(**contrastive), estimate(**contrastive, parallel={"strategy": "fsdp"})
    assert 0 < sharded < whole
