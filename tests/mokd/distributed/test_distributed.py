from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.core.errors import UserError
from mokd.distributed.local_ranks import supervise
from mokd.distributed.process_group import Ranks, core_share, first_host, ranks_from_environment
from tests.support import RESNET, ROOT, THIRD, VIT

CHECKPOINTED = [f"branches.{i}.activation_checkpointing=true" for i in range(3)]


def train_steps(output: Path, ranks: int, objective: str, *overrides: str) -> dict[str, torch.Tensor]:
    program = [sys.executable, "-m", "tests.programs.train_steps", str(output), objective, *overrides]
    assert supervise(program, ranks) == 0
    return load_file(output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """What one process with the whole batch ends in, by objective."""
    folder = tmp_path_factory.mktemp("whole")
    return cache(lambda objective: train_steps(folder / f"{objective}.safetensors", 1, objective, "--monitors"))


@pytest.mark.parametrize(
    ("objective", "ranks", "overrides"),
    [
        ("dino", 2, ["parallel.strategy=ddp"]),
        ("dino", 4, ["parallel.strategy=ddp"]),
        ("dino", 2, ["parallel.strategy=fsdp", *CHECKPOINTED]),
        ("dino", 4, ["parallel.strategy=fsdp", "parallel.reshard_after_forward=false"]),
        ("dino", 4, ["parallel.strategy=fsdp", "parallel.shard_group_size=2"]),
        ("dino", 4, ["--gpu-batchnorm", "parallel.strategy=ddp"]),
        ("dino", 2, ["--gpu-batchnorm", "parallel.strategy=fsdp", *CHECKPOINTED]),
        ("contrastive", 4, ["parallel.strategy=ddp"]),
        ("contrastive", 2, ["parallel.strategy=fsdp"]),
        ("dino-frozen", 2, ["parallel.strategy=ddp"]),
        ("dino-frozen", 2, ["parallel.strategy=fsdp"]),
        ("contrastive-frozen", 2, ["parallel.strategy=ddp"]),
        ("contrastive-frozen", 4, ["parallel.strategy=fsdp"]),
        ("seed", 2, ["parallel.strategy=ddp"]),
        ("seed", 4, ["parallel.strategy=fsdp"]),
        ("regression", 2, ["parallel.strategy=ddp"]),
    ],
)
def test_ranks_equal_one_process_with_the_whole_batch(
    objective: str, ranks: int, overrides: list[str], whole: Callable[[str], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Parameters, EMA, optimisers, centres or banks, BatchNorm statistics, monitors, with CNN and ViT, in float64."""
    split = train_steps(tmp_path / "split.safetensors", ranks, objective, "--monitors", *overrides)
    expected = whole(objective)
    assert expected.keys() == split.keys()
    assert {"student", "teacher", "optimizer"} <= {key.split("/")[1].split(".")[0] for key in expected}
    assert sum("running_var" in key for key in expected) > 5
    for key, value in expected.items():
        # AdamW divides a gradient of zero, up to rounding, by its own size: that is where the tolerance goes; an
        # effective rank has the square roots of eigenvalues that are zero up to rounding
        tolerance = 1e-5 if "feature_rank" in key else 1e-7
        torch.testing.assert_close(
            split[key], value, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


def without_batchnorm() -> str:
    """Branches whose images do not see each other."""
    convnext = {
        **RESNET,
        "name": "convnext",
        "backbone": "convnext_atto",
        "backbone_options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "output_stride": 8},
        "drop_path": 0.2,
    }
    return f"branches={json.dumps([convnext, VIT])}"


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train_steps(tmp_path_factory.mktemp("at-once") / "1.safetensors", 1, "dino", without_batchnorm())


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["optim.accumulate=4"]),
        (2, ["optim.accumulate=3"]),
        (2, ["optim.accumulate=2", "parallel.strategy=fsdp"]),
    ],
)
def test_micro_batches_equal_the_whole_batch(
    ranks: int, overrides: list[str], at_once: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Gradients, centres, stochastic depth: everything but BatchNorm, in float64."""
    parts = train_steps(tmp_path / "parts.safetensors", ranks, "dino", without_batchnorm(), *overrides)
    assert at_once.keys() == parts.keys()
    for key, value in at_once.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-7, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_sharded_half_precision_is_that_of_ddp(compute: str, tmp_path: Path) -> None:
    """Weights gathered in half precision are those that autocast would have made.

    In fp16 a gradient of the first branch overflows on one rank: all of them skip that step of it.
    """
    overrides = [f"branches={json.dumps([VIT, THIRD])}", f"precision.compute={compute}"]
    ends = [
        train_steps(tmp_path / strategy, 2, "dino", *overrides, f"parallel.strategy={strategy}")
        for strategy in ("ddp", "fsdp")
    ]
    for key, value in ends[0].items():
        if "optimizer" in key and "mlp.0.bias" not in key:
            error = (ends[1][key] - value).norm() / (value.norm() + 1e-6)
            assert error < 0.01, (key, error)
    if compute == "fp16":
        for end in ends:
            assert [float(end[f"branch-{name}/loss_scale.scale"]) for name in ("vit", "vit_wide")] == [0.5, 1.0]
            steps = [int(v) for k, v in end.items() if k.endswith("/step") and k.startswith("branch-vit/")]
            assert set(steps) == {4}  # of five


def test_weights_cast_together_end_in_the_bits_of_those_cast_one_by_one(tmp_path: Path) -> None:
    """Under DDP, with stochastic depth and micro-batches."""
    overrides = [f"branches={json.dumps([VIT, THIRD])}", "precision.compute=bf16", "optim.accumulate=2"]
    together = train_steps(tmp_path / "together", 2, "dino", *overrides)
    own = train_steps(tmp_path / "own", 2, "dino", *overrides, "--own-casts")
    assert together.keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in together.items())


def test_ranks_from_torchrun_slurm_and_nobody() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert ranks_from_environment({**torchrun, "MASTER_PORT": "7"}) == Ranks(3, 8, 1, 2, "a", 7)
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        "SLURM_JOB_ID": "41",
    }
    assert ranks_from_environment(slurm) == Ranks(5, 7, 1, 2, "gpu07", 20041)
    # the shell of `salloc` or a batch script is no rank
    assert ranks_from_environment({"SLURM_JOB_ID": "41", "SLURM_PROCID": "0"}) == Ranks()
    with pytest.raises(UserError, match="rank variables"):
        ranks_from_environment({"RANK": "zero", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "host"), [("n1,n2", "n1"), ("n[1-4]", "n1"), ("rack2-gpu[010,012]", "rack2-gpu010"), ("single", "single")]
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_failing_rank_ends_the_others() -> None:
    program = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)"
    assert supervise([sys.executable, "-c", program], 3) == 7


def test_ranks_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    rank = f"import os, time; open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w'); time.sleep(300)"
    start = f"supervise([sys.executable, '-c', {rank!r}], 2)"
    program = f"import sys; from mokd.distributed.local_ranks import supervise; {start}"
    supervisor = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while len(list(tmp_path.iterdir())) < 2:
        assert supervisor.poll() is None
        time.sleep(0.05)
    supervisor.kill()
    supervisor.wait()
    for file in tmp_path.iterdir():
        process = Path("/proc") / file.name
        # gone, or a zombie that nobody has waited for
        while process.exists() and "State:\tZ" not in (process / "status").read_text():
            time.sleep(0.05)


def test_a_rank_divides_shared_cores_alone() -> None:
    everything = set(range(16))
    assert core_share(everything, [everything] * 4) == 4  # torchrun, or SLURM without binding
    bound = [set(range(4 * i, 4 * i + 4)) for i in range(4)]
    assert core_share(bound[2], bound) == 4
    assert core_share({0, 1, 2, 3}, [{0, 1, 2, 3}, {2, 3}]) == 3  # two of its own, and half of two
    assert core_share({0}, [{0}] * 3) == 1
