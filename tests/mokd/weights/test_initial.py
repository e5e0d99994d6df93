"""First weights of runs: from every kind of source, on record, in student and teacher at step 0, read once."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from launcher.cli import main as cli
from launcher.report.build import build_report
from mokd.checkpointing import state
from mokd.checkpointing.reading import Checkpoint
from mokd.config import BranchConfig, RunConfig
from mokd.distributed.local_ranks import supervise, train_locally
from mokd.models.backbones import Backbone, build_backbone, timm_arguments
from mokd.runs.exit_codes import EXIT_DONE, EXIT_STOPPED
from mokd.runs.first_weights import facts_of, words
from mokd.runs.run_directory import RunDirectory
from mokd.weights import initial
from mokd.weights.sources import find
from tests.support import RESNET, VIT, hub_cache, tiny, tiny_config


def scrambled(net: nn.Module) -> nn.Module:
    """The network with weights and statistics that no fresh one has."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
    return net


def theirs(branch: BranchConfig, image_px: int = 32) -> nn.Module:
    """timm's own network of a branch."""
    return scrambled(timm.create_model(branch.backbone, **timm_arguments(branch, image_px))).eval()


def backbone_of(branch: BranchConfig, tensors: dict[str, Tensor], prefix: str) -> Backbone:
    backbone = build_backbone(branch, 32, drop_path=0.0, images_per_rank=1)
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return backbone.eval()


def step_zero(run: RunDirectory, output: Path, ranks: int) -> dict[str, Tensor]:
    assert supervise([sys.executable, "-m", "tests.programs.step_zero", str(run.path), str(output)], ranks) == 0
    return load_file(output)


def with_init(beton: Path, folder: Path, **changes: Any) -> RunConfig:
    """A run of two branches that start from files of timm state dicts, one of each kind."""
    config = tiny_config(beton, **changes)
    torch.save(theirs(config.branches[0]).state_dict(), folder / "resnet.pth")
    save_file(theirs(config.branches[1]).state_dict(), folder / "vit.safetensors")
    inits = {"resnet": str(folder / "resnet.pth"), "vit": str(folder / "vit.safetensors")}
    branches = tuple(branch.model_copy(update={"init": inits[branch.name]}) for branch in config.branches)
    return config.model_copy(update={"branches": branches})


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_run_has_the_features_of_timms_network_at_step_0(
    ranks: int, strategy: str, beton: Path, tmp_path: Path
) -> None:
    config = with_init(beton, tmp_path, parallel__strategy=strategy)
    run = initial.create_run(tmp_path / "run", config)
    state = step_zero(run, tmp_path / "state.safetensors", ranks)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for branch in config.branches:
        with torch.no_grad():
            expected = theirs(branch)(images)
            for network in ("student", "teacher"):
                found = backbone_of(branch, state, f"branch-{branch.name}/{network}.backbone.")(images).pooled
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_run_reads_its_source_once_and_says_where_its_weights_came_from(beton: Path, tmp_path: Path) -> None:
    config = with_init(beton, tmp_path, optim__max_steps=4, checkpoint__every_steps=2)
    run = initial.create_run(tmp_path / "run", config)
    facts = facts_of(run, config.branches[1])
    assert facts is not None
    assert facts["source"] == "file vit.safetensors"
    assert len(facts["sha256"]) == len(facts["source_sha256"]) == 64
    # the source goes away before the first step
    for name in ("resnet.pth", "vit.safetensors"):
        (tmp_path / name).unlink()
    program = [sys.executable, "-m", "tests.programs.train_until", str(run.path), "2"]
    assert supervise(program, 1) == EXIT_STOPPED
    assert f"file vit.safetensors, SHA-256 {facts['sha256'][:16]}" in build_report([run])
    # and from then on the record is not needed either
    shutil.rmtree(run.initial_weights)
    assert train_locally(run.path, 1) == EXIT_DONE
    assert words(run, config.branches[1]) == config.branches[1].init


def test_a_record_that_has_changed_is_refused(beton: Path, tmp_path: Path) -> None:
    run = initial.create_run(tmp_path / "run", with_init(beton, tmp_path))
    file = run.initial_weights / "vit.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"vit\.safetensors: has changed since it was recorded"):
        initial.load(run, run.config(), [])


def branch(backbone: str, init: str, **keys: Any) -> BranchConfig:
    optimizer = {"kind": "sgd", "lr": 0.1}
    return BranchConfig.model_validate(
        {"name": "b", "backbone": backbone, "init": init, "optimizer": optimizer, **keys}
    )


def test_timms_weights_come_from_its_cache(offline: Path) -> None:
    net = scrambled(timm.create_model("test_resnet"))  # with its classifier, as they are published
    hub_cache(offline / "hub", "timm/test_resnet.r160_in1k", model__safetensors=net.state_dict())
    found = find(branch("test_resnet", "timm"), 32)
    assert torch.equal(found.backbone["net.conv1.0.weight"], net.state_dict()["conv1.0.weight"])
    assert found.facts["source"] == "timm's test_resnet.r160_in1k (timm/test_resnet.r160_in1k)"
    assert found.facts["license"] == "apache-2.0"


def test_a_repositorys_weights_come_from_its_cache(offline: Path) -> None:
    net = scrambled(timm.create_model("test_vit"))
    files = {"model__safetensors": net.state_dict(), "config__json": {"license": "mit"}}
    hub_cache(offline / "hub", "somebody/network", **files)
    found = find(branch("test_vit", "hub:somebody/network"), 160)
    assert torch.equal(found.backbone["net.cls_token"], net.state_dict()["cls_token"])
    assert found.facts["license"] == "mit"


def test_torchvisions_weights_come_from_its_cache(offline: Path) -> None:
    net = scrambled(torchvision.models.resnet18())
    file = offline / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)
    found = find(branch("resnet18", "torchvision:ResNet18_Weights.IMAGENET1K_V1"), 32)
    assert torch.equal(found.backbone["net.conv1.weight"], net.state_dict()["conv1.weight"])


@pytest.mark.parametrize(
    ("backbone", "init", "says"),
    [
        ("test_resnet", "timm", "timm/test_resnet.r160_in1k is not in the cache and cannot be downloaded"),
        ("resnet18", "hub:nobody/nothing", "nobody/nothing is not in the cache and cannot be downloaded"),
        ("resnet18", "torchvision:ResNet18_Weights.IMAGENET1K_V1", ".pth is not in the cache and cannot be downloaded"),
        ("resnet18", "torchvision:ResNet18_Weights.V9", "torchvision has no such weights; similar: ResNet18_"),
        ("vit_base_patch16_plus_240", "timm", "timm has no weights of 'vit_base_patch16_plus_240'"),
        ("resnet18", "hub:a/b/c", "the hub has no such weights"),
        ("resnet18", "nowhere.pth", "nowhere.pth: no such file"),
        ("resnet18", "run:nowhere/vit", "not a run directory"),
        ("resnet18", ".", "is a folder; give a file of weights"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(backbone: str, init: str, says: str, offline: Path) -> None:
    with pytest.raises(UserError) as caught:
        find(branch(backbone, init), 32)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ("nowhere.pth", "nowhere.pth: no such file"),
        ("{damaged}", "damaged.pth: cannot be read safely as weights"),
        ("{other}", "branches.vit needs 'cls_token', 'pos_embed' ("),
        ("{narrow}", "'cls_token' is [1, 1, 12] instead of [1, 1, 24], "),
        ("timm", "is not in the cache and cannot be downloaded"),
        ("hub:nobody/nothing", "nobody/nothing is not in the cache and cannot be downloaded"),
        ("torchvision:ViT_B_16_Weights.IMAGENET1K_V1", ".pth is not in the cache and cannot be downloaded"),
        ("torchvision:ViT_B_16_Weights.V9", "torchvision has no such weights"),
        ("run:nowhere/vit", "not a run directory"),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["launch", "--local", "--dry-run"]], ids=" ".join)
def test_commands_end_with_one_line_and_make_nothing(
    command: list[str], init: str, says: str, beton: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: offline / f"{name}.pth" for name in ("damaged", "other", "narrow")}
    files["damaged"].write_bytes(b"not weights at all")
    narrow = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "img_size": 32}
    torch.save(timm.create_model("resnet18").state_dict(), files["other"])
    torch.save(timm.create_model("vit_tiny_patch16_224", **narrow).state_dict(), files["narrow"])
    raw = tiny(beton, branches=[RESNET, {**VIT, "init": init.format(**files)}])
    (offline / "tiny.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(SystemExit) as end:
        cli.main([*command, str(offline / "tiny.yaml"), "--root", str(offline / "runs")])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if line and not line.startswith("warning:")]
    assert line.startswith("error: ")
    assert says in line
    assert not (offline / "runs").exists()


def test_timms_weights_of_another_width_are_refused_by_the_first_mismatch(offline: Path) -> None:
    hub_cache(offline / "hub", "timm/test_vit.r160_in1k", model__safetensors=timm.create_model("test_vit").state_dict())
    with pytest.raises(UserError, match="size mismatch for cls_token") as caught:
        find(branch("test_vit", "timm", backbone_options={"embed_dim": 96}), 160)
    assert "\n" not in str(caught.value)


def test_timms_weights_take_other_channels(offline: Path) -> None:
    net = scrambled(timm.create_model("test_vit"))
    hub_cache(offline / "hub", "timm/test_vit.r160_in1k", model__safetensors=net.state_dict())
    found = find(branch("test_vit", "timm"), 160, 1)
    weight = net.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(found.backbone["net.patch_embed.proj.weight"], weight.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("init", "says"),
    [("hub:x", "expected hub:OWNER/REPOSITORY"), ("run:vit", "expected run:RUN/BRANCH"), ("timm:vit", "timm alone")],
)
def test_words_that_name_no_source(init: str, says: str, beton: Path) -> None:
    with pytest.raises(UserError, match=says):
        tiny_config(beton, branches=[{**RESNET, "init": init}])


def test_a_run_starts_from_a_branch_of_another_run(beton: Path, tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path / "first", tiny_config(beton, branches=[VIT], optim__max_steps=2))
    assert train_locally(first.path, 1) == EXIT_DONE
    with pytest.raises(UserError, match="has no branch 'resnet'; there are vit"):
        find(branch("resnet18", f"run:{first.path}/resnet"), 32)
    config = tiny_config(beton, branches=[{**VIT, "name": "second", "init": f"run:{first.path}/vit"}])
    run = initial.create_run(tmp_path / "run", config)
    facts = facts_of(run, config.branches[0])
    assert facts is not None
    assert facts["source"] == "teacher of branch vit of run first at step 2"
    saved = load_file(first.checkpoints / "step-2" / "branch-vit.safetensors")
    shutil.rmtree(first.path)
    state = step_zero(run, tmp_path / "state.safetensors", 1)
    for network in ("student", "teacher"):
        prefix = f"branch-second/{network}.backbone."
        ours = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        assert len(ours) > 10
        assert all(torch.equal(saved[f"teacher.backbone.{key}"], value) for key, value in ours.items())
    # a branch that learns begins with heads of its own
    heads = [key for key in state if ".mlp_head." in key and "teacher" in key and state[key].ndim == 2]
    assert heads
    assert not all(torch.equal(state[key], saved[key.removeprefix("branch-second/")]) for key in heads)


def test_runs_from_before_these_keys_go_on(beton: Path) -> None:
    """A checkpoint's identity has no key that says what was always done, and one that says something else."""
    config = tiny_config(beton)
    now = state.identity(config, {})
    then = copy.deepcopy(now)
    for branch in then["branches"]:
        assert not {"frozen", "freeze_backbone_epochs"} & branch.keys()
        del branch["optimizer"]["layer_decay"], branch["optimizer"]["backbone_lr_factor"]
    old = Checkpoint(Path("step-5"), 5, {"identity": then})
    state.check_identity(old, now)
    freezes = config.branches[0].model_copy(update={"freeze_backbone_epochs": 2})
    other = config.model_copy(update={"branches": (freezes, config.branches[1])})
    with pytest.raises(UserError, match=r"branches\.0\.freeze_backbone_epochs is 2 now and was None"):
        state.check_identity(old, state.identity(other, {}))
