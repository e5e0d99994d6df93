from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.distributed.accelerators import pick_device, promised_gpus, why_no_gpu
from mokd.distributed.process_group import Ranks


def test_promises() -> None:
    ranks = Ranks(local_size=4)
    assert promised_gpus(ranks, {}) is None
    assert promised_gpus(ranks, {"SLURM_STEP_ID": "0"}) == 4
    assert promised_gpus(ranks, {"SLURM_STEP_ID": "0", "MOKD_GPUS_PER_NODE": "0"}) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_promised_gpu_that_is_not_there() -> None:
    with pytest.raises(UserError, match="2 GPUs were promised here, but rank 0 can use none") as caught:
        pick_device(Ranks(), "auto", 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a GPU is wanted"):
        pick_device(Ranks(), "cuda")


def test_cpus_where_they_were_asked_for() -> None:
    assert pick_device(Ranks(), "cpu", 4).type == "cpu"
    assert pick_device(Ranks(), "auto", 0).type == "cpu"


@pytest.mark.skipif(torch.version.cuda is None, reason="a build without CUDA is named before everything else")
def test_causes(tmp_path: Path) -> None:
    assert "CUDA_VISIBLE_DEVICES is empty" in why_no_gpu({"CUDA_VISIBLE_DEVICES": ""})
    assert "forgotten" in why_no_gpu({"SLURM_STEP_ID": "0"})
    assert "no NVIDIA driver" in why_no_gpu({"CUDA_VISIBLE_DEVICES": "0"}, root=tmp_path)
