"""What a user sees: help, answers, and one clear line with exit status 2 for a mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_pipeline.beton.manifest import manifest_path
from launcher.cli import main as cli
from mokd.runs.exit_codes import EXIT_GAVE_UP
from mokd.runs.run_directory import RunDirectory
from tests.support import mokd, tiny, tiny_config


@pytest.fixture
def config(beton: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    changes = {"evaluation__train": str(beton), "evaluation__test": str(beton.with_name("test.beton"))}
    sizes = {"evaluation__resize_px": 36, "evaluation__crop_px": 32, "evaluation__every_epochs": 1}
    file.write_text(yaml.safe_dump(tiny(beton, optim__epochs=1, optim__warmup_epochs=0, **changes, **sizes)))
    return file


ErrorLine = Callable[..., str]


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> ErrorLine:
    """Runs a command in this process, which is quicker; it must end with status 2 and one line, which is returned."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert end.value.code == 2, err
        lines = [line for line in err.splitlines() if line and not line.startswith("warning:")]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert out == ""
        return lines[0]

    return run


def test_train_evaluate_and_print(config: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    # torch's bf16 convolution on CPUs gives undefined weight gradients for maps of one pixel: no smaller crops here
    bf16 = ("precision.compute=bf16", "views.global_crops.size_px=64", "views.local_crops.size_px=32")
    trained = mokd("train", config, "--root", tmp_path / "runs", "--nproc", "2", *bf16)
    assert trained.returncode == 0, trained.stderr
    assert "k-NN % before training" in trained.stdout
    run = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = set().union(*records)
    for branch in ("resnet", "vit"):
        losses = {"total", "self_mlp", "self_thead", "cross_mlp", "cross_search"}
        assert {f"loss/{branch}/{term}" for term in losses} <= keys
        monitors = {"lr", "teacher_entropy", "center_norm", "feature_std", "feature_rank"}
        assert {f"{name}/{branch}" for name in monitors} <= keys
        assert [r["step"] for r in records if f"eval/{branch}/knn_top1" in r] == [0, 5]
    assert {"step", "epoch", "images_seen", "images_per_second", "data_wait_fraction"} <= keys
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["checkpoint_step"]) == ("done", 5, 5)
    assert "mokd train writes to its terminal; what it did: mokd status" in error_line("logs", run)

    evaluated = mokd("eval", run, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads(evaluated.stdout)["results"]
    assert {(r["branch"], r["network"], r["task"], r["k"], r["step"]) for r in results} == {
        (branch, "teacher", "knn", k, 5) for branch in ("resnet", "vit") for k in (10, 20, 30)
    }
    # the same numbers as those measured while training
    for branch in ("resnet", "vit"):
        best = max(r["top1"] for r in results if r["branch"] == branch)
        last = [r[f"eval/{branch}/knn_top1"] for r in records if f"eval/{branch}/knn_top1" in r][-1]
        assert best == pytest.approx(last, abs=1e-3)
    students = mokd("eval", run, "--network", "student", "--json")
    assert {r["network"] for r in json.loads(students.stdout)["results"]} == {"student"}

    assert "exists already; continue it with --resume" in error_line("train", config, "--root", tmp_path / "runs")
    again = mokd("train", config, "--root", tmp_path / "runs", "--resume", "--nproc", "2", *bf16)
    assert again.returncode == 0, again.stderr
    for override, says in (
        ("objective.prototypes=50", "objective.prototypes is 50 now and was 40"),
        ("branches.vit.backbone=vit_small_patch16_224", "branches.1.backbone is 'vit_small_patch16_224' now"),
    ):
        assert says in error_line("train", config, "--root", tmp_path / "runs", "--resume", *bf16, override)
    assert "given 'linearr', expected" in error_line("eval", run, "--task", "linearr")
    for file in (run / "checkpoints" / "step-5").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert "no complete checkpoint" in error_line("eval", run)


def test_configuration_is_printed_resolved(config: Path, error_line: ErrorLine) -> None:
    printed = mokd("config", config, "optim.epochs=7")
    assert yaml.safe_load(printed.stdout)["optim"]["epochs"] == 7
    assert yaml.safe_load(printed.stdout)["objective"]["student_temp"] == 0.1
    assert json.loads(mokd("config", "vit_s_resnet50", "--json").stdout)["name"] == "vit_s_resnet50"
    line = error_line("config", config, "data.workers=2", "optim.epoch=7", "optim.accumulate=2")
    assert line == f"error: {config}: optim.epoch: unknown key; did you mean 'epochs'?"
    assert "no such configuration file; in configs/: " in error_line("config", "nothing.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("branches.0.backbone=resnet999", "branches.resnet.backbone: timm has no model 'resnet999'"),
        ("cluster.nodes=-4", "cluster: nodes: given -4"),
        ("branches.0.init=/nowhere.pth", "/nowhere.pth"),
        ("optim.global_batch=7", "global_batch"),
    ],
)
def test_a_configuration_is_checked_as_a_launch_does(
    config: Path, override: str, says: str, error_line: ErrorLine
) -> None:
    assert says in error_line("config", config, "--check", override, "cluster.gpus_per_node=2")


def test_a_configuration_that_can_work_is_printed(config: Path) -> None:
    checked = mokd("config", config, "--check")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == mokd("config", config).stdout


@pytest.mark.parametrize(
    ("folder", "status", "says"),
    [
        ("jobs/launches", 2, "error: {path}: the launch cannot be recorded: File exists"),
        ("attempts", 1, "failed: {path}: File exists"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_said_in_one_line(
    folder: str, status: int, says: str, beton: Path, tmp_path: Path
) -> None:
    run = RunDirectory.create(tmp_path / "run", tiny_config(beton))
    path = run.path / folder
    path.parent.mkdir(exist_ok=True)
    path.touch()
    failed = mokd("resume", run.path, "--local")
    assert failed.returncode == status, failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == says.format(path=path)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.train=missing.beton"], "missing.beton: no such file"),
        (["data.train=."], "is a folder; convert it first"),
        (["branches.vit.backbone=vit_smal"], "timm has no model 'vit_smal'"),
        (["optim.global_batch=7"], "cannot be dealt to 2 ranks evenly"),
        (["optim.global_batch=400"], "400 images per step, but"),
        (["objective.prototypes=1"], "at least 2"),
        (["views.local_crops.size_px=20"], "'vit_tiny_patch16_224' cannot take crops of 20 px"),
        (["evaluation.crop_px=30"], "cannot take crops of 30 px"),
        (["branches.vit.init=none.safetensors"], "none.safetensors: no such file"),
        (["branches.vit.init=run:nowhere/vit"], "nowhere: not a run directory"),
        (["branches.vit.init=torchvision:ViT_B_16_Weights.BEST"], "torchvision has no such weights"),
        (["branches.vit.frozen=true"], "frozen: gives the targets of the weights that init names"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_anything_starts(
    overrides: list[str], says: str, config: Path, tmp_path: Path, error_line: ErrorLine
) -> None:
    assert says in error_line("train", config, "--root", tmp_path / "runs", "--nproc", "2", *overrides)
    assert not (tmp_path / "runs").exists()


def test_damaged_and_foreign_betons(config: Path, beton: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    own = tmp_path / "own.beton"
    shutil.copy(beton, own)
    assert "manifest" in error_line("train", config, f"data.train={own}")
    shutil.copy(manifest_path(beton), manifest_path(own))
    content = own.read_bytes()
    own.write_bytes(content[: len(content) // 2])
    assert str(own) in error_line("train", config, f"data.train={own}")
    own.write_bytes(b"\x07" + content[1:])
    assert str(own) in error_line("train", config, f"data.train={own}")


def test_image_folder_without_images(tmp_path: Path, error_line: ErrorLine) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in error_line("convert", tmp_path / "empty", tmp_path / "out.beton")
    assert not (tmp_path / "out.beton").exists()


def test_more_workers_than_cores_is_a_warning(config: Path, tmp_path: Path) -> None:
    result = mokd("train", config, "--root", tmp_path, "data.workers=4096", "optim.max_steps=1")
    assert result.returncode == 0, result.stderr
    assert "warning: data.workers: 4096 workers share" in result.stderr


def test_a_non_finite_loss_stops_the_run_and_names_the_term(config: Path, tmp_path: Path) -> None:
    overrides = ["branches.resnet.optimizer.lr=1.0e+30", "optim.clip_grad_norm=null", "evaluation.every_epochs=null"]
    result = mokd("train", config, "--root", tmp_path, *overrides)
    assert result.returncode == EXIT_GAVE_UP  # the same again would come to the same
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("failed: step ")]
    assert "All that is known is in" in line
    status = json.loads((tmp_path / "tiny" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "loss/resnet/" in status["reason"]
    assert "not finite; stopped before the optimiser step" in status["reason"]


@pytest.mark.parametrize("command", ["convert", "verify", "train", "eval", "config"])
def test_help_has_an_example(command: str) -> None:
    result = mokd(command, "--help")
    assert result.returncode == 0
    assert f"Example: mokd {command}" in result.stdout


def test_a_mistake_in_a_real_process_has_no_traceback() -> None:
    result = mokd("train", "nothing.yaml")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: nothing.yaml: no such configuration file")
