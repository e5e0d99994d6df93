"""`precision.deterministic`: what can be shown of it without a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.core import schema
from mokd.config import PrecisionConfig, RunConfig
from mokd.distributed.free_port import free_port
from mokd.distributed.process_group import Ranks, leave
from mokd.distributed.stopping import StopRequest
from mokd.evaluation import knn
from mokd.losses import prototype_loss
from mokd.losses.kernels import plain
from mokd.objectives.base import build_objective
from mokd.optim.precision import set_arithmetic
from mokd.parallel.build import build_branch
from mokd.parallel.parallelize import ddp_options
from mokd.training.step import TrainingStep
from tests.support import CONTRASTIVE, ROOT, tiny_config

CPU = torch.device("cpu")
# operations that torch refuses on CUDA in this mode, as torch.use_deterministic_algorithms lists them
REFUSED = re.compile(
    r"_?adaptive_(avg|max)_pool\dd_backward|avg_pool3d_backward|fractional_max_pool\dd_backward|max_unpool\dd"
    r"|_?upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)(_aa)?_backward|reflection_pad\dd_backward"
    r"|nll_loss2d_.*|_ctc_loss_backward|_embedding_bag_.*backward|put_?|histc|bincount|median|grid_sampler_\dd_backward"
    r"|scatter_reduce_?"
)


class Names(TorchDispatchMode):
    """Names of the operations that ran, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards this process computes as before."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    set_arithmetic(PrecisionConfig())
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def trained(config: RunConfig, steps: int) -> list[torch.Tensor]:
    """All parameters after some steps on the CPU from the configuration's first weights."""
    set_arithmetic(config.precision)
    objective, images = build_objective(config, CPU), config.optim.global_batch
    branches = [
        build_branch(config, branch, objective, CPU, images_per_rank=images, epoch_steps=5)
        for branch in config.branches
    ]
    step = TrainingStep(config, branches, objective, StopRequest(), Ranks(), CPU, 5)
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        shapes = [(g.count, images, 3, g.size_px, g.size_px) for g in config.views.groups]
        step.run(number, [torch.randn(shape, generator=generator) for shape in shapes], 0)
    return [p.detach() for branch in branches for p in (*branch.student.parameters(), *branch.teacher.parameters())]


def test_an_operation_without_such_an_algorithm_raises(arithmetic: None) -> None:
    target, index = torch.zeros(4), torch.tensor([0, 0])
    set_arithmetic(PrecisionConfig(deterministic=True))
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        target.put_(index, torch.ones(2))
    assert torch.backends.cudnn.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    set_arithmetic(PrecisionConfig())
    target.put_(index, torch.ones(2))
    assert not torch.backends.cudnn.deterministic


def test_the_workspace_of_cublas_is_the_users_where_he_has_set_it(
    arithmetic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_arithmetic(PrecisionConfig())
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    set_arithmetic(PrecisionConfig(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_arithmetic(PrecisionConfig(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("kind", ["dino", "contrastive"])
def test_training_gives_the_same_bits_with_it_on(kind: str, arithmetic: None) -> None:
    changes: dict[str, Any] = {"optim__warmup_epochs": 0, "optim__freeze_last_layer_epochs": 0}
    changes |= CONTRASTIVE if kind == "contrastive" else {}
    ends = [trained(tiny_config(precision__deterministic=True, **changes), 2) for _ in range(2)]
    # CPU kernels are deterministic anyway, and this chooses no others
    ends.append(trained(tiny_config(**changes), 2))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_no_operation_of_a_step_is_one_that_gpus_refuse(arithmetic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline's networks on small crops, forwards, backwards, updates; the losses in torch operations (the code of
    Triton's kernels has no atomic additions, as tests/gpu/test_kernels_compile.py sees).
    """
    small = ["optim.global_batch=2", "objective.prototypes=64", "optim.freeze_last_layer_epochs=0"]
    small += ["views.global_crops.size_px=64", "views.local_crops.size_px=32", "views.local_crops.count=2"]
    small += ["branches.vit_s.backbone_options={depth: 2}", "objective.t_head.depth=1"]
    config = schema.load(RunConfig, ROOT / "configs" / "vit_s_resnet50.yaml", small)
    monkeypatch.setattr(prototype_loss, "_kernels", lambda on_gpu: plain)
    with Names() as names:
        trained(config, 1)
    assert {"convolution_backward", "native_layer_norm_backward"} <= names.seen
    assert not [found for found in names.seen if REFUSED.fullmatch(found)]


def test_nor_one_of_an_evaluation() -> None:
    features, labels = nn.functional.normalize(torch.randn(60, 8), dim=1), torch.arange(60) % 3
    with Names() as names:
        knn.classify(knn.blocks_of(features[:40]), labels[:40], features[40:], [5], 0.07, 3)
    assert "topk" in names.seen
    assert not [found for found in names.seen if REFUSED.fullmatch(found)]


def test_ddp_sums_in_the_same_order_in_every_step() -> None:
    """A resumed run begins with buckets as they are built; in one that was not interrupted they must not be others."""
    rebuilt = {}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        for deterministic in (False, True):
            options = ddp_options(on_gpu=True, accumulate=False, deterministic=deterministic)
            model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), **options)
            for _ in range(2):  # a static graph is known after the first pass, its order after the second
                model(torch.randn(3, 4)).sum().backward()
            rebuilt[deterministic] = model.reducer._rebuild_buckets()  # what the next forward pass begins with
    finally:
        leave()
    assert rebuilt == {False: True, True: False}
