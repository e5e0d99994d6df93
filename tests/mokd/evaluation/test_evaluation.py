"""`mokd eval` on runs: what is written, what is computed once, what ranks and interruptions change (nothing)."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from json import loads
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from mokd.checkpointing import choose, state
from mokd.config import BranchConfig, LinearConfig
from mokd.distributed.local_ranks import train_locally
from mokd.evaluation import finetune, frozen, linear_task, results, tasks
from mokd.evaluation.cache import open_features
from mokd.evaluation.entry import evaluate
from mokd.evaluation.features import class_tokens, probe_reading
from mokd.evaluation.kept_state import KeptState
from mokd.evaluation.request import Request
from mokd.evaluation.results import Evaluation
from mokd.models.backbones import build_backbone
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.files import read_json
from mokd.runs.run_directory import RunDirectory
from tests.support import RESNET, ROOT, VIT, mokd, tiny_config

EVALUATION = {"evaluation__resize_px": 36, "evaluation__crop_px": 32, "data__workers": 1}
SHORT = ("evaluation.linear.epochs=4", "evaluation.semi.epochs=3", "evaluation.semi.batch=16")


@pytest.fixture(scope="module")
def trained(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of two steps."""
    config = tiny_config(
        beton,
        optim__max_steps=2,
        evaluation__train=str(beton),
        evaluation__test=str(beton.with_name("test.beton")),
        **EVALUATION,
    )
    run = RunDirectory.create(tmp_path_factory.mktemp("runs") / "tiny", config)
    assert train_locally(run.path, 1) == EXIT_DONE
    return run


@pytest.fixture
def run(trained: RunDirectory, tmp_path: Path) -> RunDirectory:
    """The same run, without evaluations."""
    for name in ("config.yaml", "checkpoints"):
        (tmp_path / name).symlink_to(trained.path / name)
    return RunDirectory(tmp_path)


def ask(run: RunDirectory, task: str = "knn", *overrides: str, nproc: int = 1, **changes: Any) -> Evaluation:
    evaluation, status = evaluate(Request(run.path, task, overrides=(*SHORT, *overrides), **changes), nproc)
    assert status == EXIT_DONE
    assert evaluation is not None
    return evaluation


def same(a: Evaluation, b: Evaluation) -> bool:
    return a.results == b.results and all(np.array_equal(a.predictions[k], b.predictions[k]) for k in a.predictions)


def features(run: RunDirectory, images: int) -> np.ndarray:
    """The first branch's pooled features of as many images, from the cache."""
    for place in (run.evaluations / "features").iterdir():
        index: Any = read_json(place / "index.json")
        if index["subject"]["backbone"] == RESNET["backbone"] and index["reading"] == "pooled":
            found = open_features(place)
            if found.size == images:
                return found.take(np.arange(images)).numpy()
    raise AssertionError("no such features")


def test_knn_is_scikit_learns_and_is_written_with_a_prediction_for_every_image(run: RunDirectory, beton: Path) -> None:
    evaluation = ask(run)
    path = results.result_path(run.evaluations, "knn", "teacher", 2)
    written = results.read(path)
    assert same(written, evaluation)
    assert (written.task, written.network, written.step, written.images) == ("knn", "teacher", 2, 40)
    assert written.labels.tolist() == [label for label in range(10) for _ in range(4)]
    assert [r["k"] for r in written.results if r["headline"]] == [20, 20]
    for record in written.results:
        hits = written.predictions[record["predictions"]] == written.labels
        assert record["top1"] == round(100 * hits.mean(), 3)
        assert record["top5"] >= record["top1"]
    labels = np.arange(160) // 16
    for k in (10, 20, 30):
        theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1.0 - d) / 0.07))
        theirs.fit(features(run, 160), labels)
        assert np.array_equal(written.predictions[f"resnet/k={k}"], theirs.predict(features(run, 40)))

    path.with_suffix(".safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="predictions are missing or damaged"):
        results.read(path)


def test_features_are_computed_once_and_again_when_damaged(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    extract = frozen.extract
    monkeypatch.setattr(frozen, "extract", lambda *arguments: passes.append(len(arguments[0])) or extract(*arguments))
    first = ask(run)
    assert passes == [2, 2]  # both networks at once, for training and for test images
    ask(run, "knn", "evaluation.knn.temperature=0.1")
    assert passes == [2, 2]
    damaged = sorted((run.evaluations / "features").rglob("*.npy"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert same(ask(run, again=True), first)
    assert passes == [2, 2, 1]
    # another crop: features of the one before are of no use any more
    ask(run, "knn", "evaluation.crop_px=24")
    assert len(list((run.evaluations / "features").iterdir())) == 4
    assert not list((run.evaluations / "features").glob(".*"))


def test_a_result_is_computed_again_only_when_it_would_be_another(run: RunDirectory) -> None:
    one = ask(run, branches=("vit",))
    assert {r["branch"] for r in one.results} == {"vit"}
    path = results.result_path(run.evaluations, "knn", "teacher", 2)
    stamp = path.stat().st_mtime_ns
    ask(run, branches=("vit",))
    assert path.stat().st_mtime_ns == stamp
    other = ask(run, branches=("resnet",))
    assert [r["branch"] for r in other.results] == ["resnet"] * 3
    assert [r["branch"] for r in results.read(path).results] == ["resnet"] * 3 + ["vit"] * 3
    both = results.read(path).protocols
    assert both.keys() == {"resnet", "vit"}
    assert len(set(both.values())) == 1
    changed = ask(run, "knn", "evaluation.knn.k=[7]")
    assert changed.protocols.keys() == both.keys()
    assert changed.protocols != both
    assert [(r["branch"], r["k"], r["headline"]) for r in changed.results] == [("resnet", 7, True), ("vit", 7, True)]
    ask(run, name="seven")
    assert results.result_path(run.evaluations, "seven", "teacher", 2).exists()


def test_other_fractions_of_the_labels_join_those_on_record(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(run, "semi", "evaluation.semi.fractions=[0.5]")
    trained, original = list[float](), finetune.finetune_task

    def noted(work: Any, section: Any, fractions: Any) -> Any:
        trained.extend(fractions)
        return original(work, section, fractions)

    monkeypatch.setattr(tasks, "finetune_task", noted)
    both = ask(run, "semi", "evaluation.semi.fractions=[0.25, 0.5]")
    assert trained == [0.25]
    found = [(r["branch"], r["fraction"], r["headline"]) for r in both.results]
    assert found == [(b, f, f == 0.5) for b in ("resnet", "vit") for f in (0.25, 0.5)]
    for key, expected in first.predictions.items():
        assert np.array_equal(both.predictions[key], expected)
    assert same(results.read(results.result_path(run.evaluations, "semi", "teacher", 2)), both)
    assert same(ask(run, "semi", "evaluation.semi.fractions=[0.5]"), both)  # nothing is lost, and nothing computed
    assert trained == [0.25]
    ask(run, "semi", "evaluation.semi.fractions=[0.5]", branches=("vit",), again=True)
    assert trained == [0.25, 0.5]
    # other settings are another protocol
    changed = ask(run, "semi", "evaluation.semi.fractions=[0.25]", "evaluation.semi.epochs=2")
    assert [r["fraction"] for r in changed.results] == [0.25, 0.25]


@pytest.mark.parametrize("task", ["knn", "linear", "linear with augmentation", "semi"])
def test_two_ranks_find_what_one_finds(task: str, run: RunDirectory) -> None:
    overrides = ("evaluation.linear.augment=true", "evaluation.linear.batch=32") if "augment" in task else ()
    one = ask(run, task.split()[0], *overrides)
    for place in (run.evaluations / "features").glob("*/index.json"):
        place.unlink()
    two = ask(run, task.split()[0], *overrides, nproc=2, again=True)
    assert two.labels.tolist() == one.labels.tolist()
    assert [r["predictions"] for r in two.results] == [r["predictions"] for r in one.results]
    for key, expected in one.predictions.items():
        # rounding depends on the shapes of batches, and may decide between two classes that are equally likely
        assert (two.predictions[key] == expected).mean() >= 0.95, key


@pytest.mark.parametrize(
    ("task", "owner", "step", "total"),
    [
        ("linear", linear_task, "train_epoch", 4),
        ("semi", finetune.FineTuning, "_epoch", 3 * 2 * 2),  # epochs x fractions x branches
    ],
    ids=["linear", "semi"],
)
def test_a_call_that_was_cut_off_continues(
    task: str, owner: Any, step: str, total: int, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(run, task)
    assert not list((run.evaluations / "state").iterdir())  # of no use any more
    original, epochs = getattr(owner, step), list[str]()

    def counted(*arguments: Any) -> Any:
        if len(epochs) == 2:
            epochs.append("cut off")
            raise KeyboardInterrupt
        epochs.append("epoch")
        return original(*arguments)

    monkeypatch.setattr(owner, step, counted)
    with pytest.raises(KeyboardInterrupt):
        ask(run, task, again=True)
    assert same(ask(run, task, again=True), whole)
    assert epochs.count("epoch") == total


def test_a_state_that_is_not_whole_costs_a_start_from_the_beginning(tmp_path: Path) -> None:
    kept = KeptState(tmp_path / "state.safetensors", is_main=True)
    assert kept.load() == (0, {})
    kept.save(3, {"a": torch.arange(5)})
    epochs, tensors = kept.load()
    assert epochs == 3
    assert torch.equal(tensors["a"], torch.arange(5))
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:-1])
    assert kept.load() == (0, {})
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_linear_finds_its_best_rate_and_reads_the_last_blocks(run: RunDirectory) -> None:
    evaluation = ask(run, "linear")
    for branch in ("resnet", "vit"):
        own = [r for r in evaluation.results if r["branch"] == branch]
        assert len(own) == 9
        assert evaluation.record(branch)["top1"] == max(r["top1"] for r in own)
    assert {(r["branch"], r["features"]) for r in evaluation.results} == {
        ("resnet", "pooled"),
        ("vit", "class tokens of 2"),
    }


def test_the_class_token_of_the_last_block_is_the_pooled_feature() -> None:
    branch = schema.validate(BranchConfig, VIT, "branch")
    backbone = build_backbone(branch, 32, drop_path=0.0, images_per_rank=2).eval()
    images = torch.randn(2, 3, 32, 32)
    both = class_tokens(backbone, images, blocks=2, patch_mean=False)
    assert both.shape == (2, 48)
    torch.testing.assert_close(both[:, 24:], backbone(images).pooled)
    with_mean = class_tokens(backbone, images, blocks=2, patch_mean=True)
    assert torch.equal(with_mean[:, :48], both)
    torch.testing.assert_close(with_mean[:, 48:], backbone(images).tokens.mean(dim=1))


@pytest.mark.parametrize(
    ("options", "settings", "name", "width"),
    [
        ({"embed_dim": 384, "num_heads": 6}, {}, "class tokens of 4", 4 * 384),
        ({"embed_dim": 768, "num_heads": 12}, {}, "class tokens of 1", 768),
        ({"embed_dim": 768, "num_heads": 12}, {"last_blocks": 2}, "class tokens of 2", 2 * 768),
        (
            {"embed_dim": 768, "num_heads": 12},
            {"patch_mean": True},
            "class tokens of 1 and the mean of patch tokens",
            2 * 768,
        ),
    ],
)
def test_the_probe_reads_four_blocks_of_a_small_transformer_and_one_of_a_wide_one(
    options: dict, settings: dict, name: str, width: int
) -> None:
    vit = {**VIT, "backbone_options": {"patch_size": 16, "depth": 5, **options}}
    backbone = build_backbone(schema.validate(BranchConfig, vit, "branch"), 32, drop_path=0.0, images_per_rank=2).eval()
    found, read = probe_reading(backbone, LinearConfig(**settings))
    assert found == name
    with torch.no_grad():
        assert read(backbone, torch.randn(2, 3, 32, 32)).shape == (2, width)


def test_a_file_is_evaluated_as_the_run_that_it_is_of(run: RunDirectory, beton: Path, tmp_path: Path) -> None:
    found = choose.newest(run)
    assert found is not None
    tensors = state.network_tensors(found, "resnet", "teacher")
    backbone = {k.removeprefix("backbone.net."): v for k, v in tensors.items() if k.startswith("backbone.net.")}
    file = tmp_path / "weights.safetensors"
    save_file({**{f"module.backbone.{k}": v for k, v in backbone.items()}, "module.head.0.weight": v0(backbone)}, file)
    settings = (
        *("views.global_crops.size_px=32", "data.workers=1", "evaluation.resize_px=36", "evaluation.crop_px=32"),
        *(f"branches.0.backbone_options.{key}={value}" for key, value in RESNET["backbone_options"].items()),
    )
    request = Request(
        file,
        overrides=settings,
        train=beton,
        test=beton.with_name("test.beton"),
        backbone=RESNET["backbone"],
    )
    evaluation, _ = evaluate(request, 1)
    assert evaluation is not None
    expected = ask(run)
    for k in (10, 20, 30):
        assert np.array_equal(evaluation.predictions[f"resnet10t/k={k}"], expected.predictions[f"resnet/k={k}"])
    assert (tmp_path / "weights.safetensors.eval" / "knn-weights-step-0.json").exists()
    with pytest.raises(UserError, match="say which network"):
        evaluate(dataclasses.replace(request, backbone=None), 1)
    with pytest.raises(UserError, match=r"'resnet18' needs 'conv1\.weight'"):
        evaluate(dataclasses.replace(request, backbone="resnet18", overrides=()), 1)
    save_file({**backbone, "layer9.weight": v0(backbone)}, file)
    with pytest.raises(UserError, match=r"holds 'layer9\.weight', which 'resnet10t' does not know"):
        evaluate(request, 1)


def v0(tensors: dict[str, Any]) -> Any:
    return next(iter(tensors.values())).clone()


def test_the_command_line_prints_one_object_or_a_table(run: RunDirectory) -> None:
    short = [item for override in SHORT for item in ("--set", override)]
    printed = mokd("eval", run.path, "--task", "linear", "--branch", "vit", "--nproc", "2", "--json", *short)
    assert printed.returncode == 0, printed.stderr
    document = loads(printed.stdout)
    assert {r["branch"] for r in document["results"]} == {"vit"}
    assert {"task", "network", "step", "checkpoint", "test", "images", "results"} <= document.keys()
    table = mokd("eval", run.path, "--task", "linear", "--branch", "vit", *short)
    assert "class tokens of 2" in table.stdout


def test_ranks_that_a_launcher_has_started_print_once(run: RunDirectory) -> None:
    command = [sys.executable, "-m", "launcher.cli", "eval", str(run.path), "--json"]
    program = f"import sys; from mokd.distributed.local_ranks import supervise; sys.exit(supervise({command!r}, 2))"
    started = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [r["k"] for r in loads(started.stdout)["results"]] == [10, 20, 30] * 2
