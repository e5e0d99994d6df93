"""What torch.compile makes of networks in a large run, counted with the fake process group."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from mokd.models.backbones import build_backbone
from mokd.models.sync_batchnorm import GpuSyncBatchNorm, synchronize_batchnorm
from tests.gpu.fake_cuda import fake_ranks
from tests.support import RESNET, VIT, tiny_config


@pytest.mark.parametrize("branch", [RESNET, VIT], ids=["resnet", "vit"])
def test_a_backbone_is_one_graph_for_each_size_of_crops(branch: dict[str, object]) -> None:
    """At 32 ranks, with the BatchNorm of GPUs, forwards and backwards; the second step compiles nothing."""
    (config,) = tiny_config(branches=[branch]).branches
    backbone = build_backbone(config, 32, drop_path=config.drop_path, images_per_rank=2)
    torch._dynamo.reset()
    counters.clear()
    counted = CompileCounterWithBackend("aot_eager")
    with fake_ranks(32):
        synchronize_batchnorm(backbone, torch.device("cuda"))
        assert branch is VIT or any(isinstance(m, GpuSyncBatchNorm) for m in backbone.modules())
        backbone.compile(backend=counted, dynamic=False)
        for _ in range(2):
            for size in (32, 16):
                backbone(torch.randn(4, 3, size, size)).pooled.sum().backward()
    torch._dynamo.reset()
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counted.frame_count == 2
