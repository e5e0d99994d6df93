"""The comparison with solo baselines, from training to the record; interrupted, and called again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gain import locate, plan, run
from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import dump_yaml
from mokd.comparison.solo import solo
from mokd.config import RunConfig
from mokd.runs.exit_codes import EXIT_STOPPED
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from mokd.training.start import prepare
from tests.support import RESNET, ROOT, SEED, VIT, frozen, tiny_config


def evaluated(beton: Path, **changes: Any) -> RunConfig:
    section = {"train": str(beton), "test": str(beton.with_name("test.beton")), "resize_px": 32, "crop_px": 32}
    semi = {"fractions": [0.5, 1.0], "epochs": 1}
    return tiny_config(beton, evaluation={**section, "every_epochs": 1, "knn": {"k": [3, 5]}, "semi": semi}, **changes)


def command(folder: Path, *more: str) -> list[str]:
    options = ["--config", str(folder / "tiny.yaml"), "--seeds", "0", "--task", "knn", "--json", *more]
    return [sys.executable, "-m", "launcher.cli", "bench", "gain", *options]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(folder, *more), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def attempts(folder: Path) -> dict[str, int]:
    return {path.name: RunDirectory(path).current_attempt() for path in sorted((folder / "runs").iterdir())}


def test_interrupted_and_called_again_it_ends_in_the_whole_comparison(beton: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_yaml(evaluated(beton)))
    first, pair = start(tmp_path), RunDirectory(tmp_path / "runs" / "tiny-seed-0")
    while first.poll() is None and not any(r["step"] >= 1 for r in read_metrics(pair.metrics_file)):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate()
    assert first.returncode == EXIT_STOPPED, said
    assert pair.read_status()["state"] == "stopped"

    second = start(tmp_path)
    printed, said = second.communicate()
    assert second.returncode == 0, said
    assert attempts(tmp_path) == {"tiny-seed-0": 2, "tiny-seed-0-solo-resnet": 1, "tiny-seed-0-solo-vit": 1}
    found = json.loads(printed)
    branches = found["tasks"]["knn"]["branches"]
    assert branches.keys() == {"resnet", "vit"}
    for branch in branches.values():
        assert branch["gain"] == pytest.approx(branch["pair"] - branch["solo"], abs=0.002)
        assert branch["ci95"][0] <= branch["gain"] <= branch["ci95"][1]
    # what is compared is the last step's k-NN, which is also the end of the curve
    curve = found["curves"]["dino"]["vit"]["pair"]["0"]
    assert [step for step, _ in curve] == [0, 5, 10, 15]
    assert branches["vit"]["pair"] == pytest.approx(curve[-1][1], abs=0.01)
    assert [about["steps"] for about in found["runs"]] == [15, 15, 15]
    assert {"versions", "commit", "processor", "command"} <= found["machine"].keys()

    third = start(tmp_path, "--task", "semi")
    again, said = third.communicate()
    assert third.returncode == 0, said
    assert said.count("trained already") == 3
    assert max(attempts(tmp_path).values()) == 2
    tasks = json.loads(again)["tasks"]
    assert tasks["knn"] == found["tasks"]["knn"]
    assert [tasks[f"semi-{at}"]["at"] for at in ("0.5", "1")] == [0.5, 1.0]


def done(root: Path, name: str, config: RunConfig) -> RunDirectory:
    run = RunDirectory.create(root / name, config)
    run.write_status("done", run.claim_attempt())
    return run


def test_the_plan_is_every_pair_then_its_branches(beton: Path) -> None:
    names = [config.name for config in plan([evaluated(beton)], [4, 7])]
    assert names[:3] == ["tiny-seed-4", "tiny-seed-4-solo-resnet", "tiny-seed-4-solo-vit"]
    assert [config.seed for config in plan([evaluated(beton)], [4, 7])] == [4, 4, 4, 7, 7, 7]
    with pytest.raises(UserError, match="tiny: has one branch"):
        plan([evaluated(beton, branches=[VIT])], [0])
    with pytest.raises(UserError, match=r"needs both evaluation.train and evaluation.test"):
        plan([tiny_config(beton)], [0])


def test_a_rival_has_the_baseline_of_the_pair_and_frozen_branches_have_none(beton: Path) -> None:
    still = [frozen(RESNET), VIT]
    rival = evaluated(beton, branches=still, name="rival", **SEED)
    beside = evaluated(beton, branches=still, name="beside")
    names = [config.name for config in plan([evaluated(beton), rival, beside], [4])]
    pair = ["tiny-seed-4", "tiny-seed-4-solo-resnet", "tiny-seed-4-solo-vit"]
    assert names == [*pair, "rival-seed-4", "beside-seed-4", "beside-seed-4-solo-vit"]
    with pytest.raises(UserError, match="rival: objective seed has no baseline of its own"):
        plan([rival], [4])


def test_learning_together_and_from_a_static_teacher_are_one_table(beton: Path, tmp_path: Path) -> None:
    """The partner is trained alone as a baseline of the pair, and teaches in the rival then."""
    teacher = tmp_path / "tiny-seed-0-solo-resnet"
    rival = [{**frozen(RESNET), "init": f"run:{teacher}/resnet"}, VIT]
    short = {"optim__max_steps": 2}
    configs = [evaluated(beton, **short), evaluated(beton, branches=rival, name="rival", **SEED, **short)]
    found = run(configs, [0], ["knn"], tmp_path, 1, print)
    knn = found.comparisons["knn"]
    assert [(m.label, sorted(m.branches)) for m in knn.methods] == [("dino", ["resnet", "vit"]), ("seed", ["vit"])]
    together, static = (method.branches["vit"] for method in knn.methods)
    assert together.gain.solo == static.gain.solo
    assert static.gain.gain_ci95[0] <= static.gain.gain <= static.gain.gain_ci95[1]
    # the first weights of the branch that learns are the same in all three
    assert {curves[0][0] for b in (together, static) for curves in (b.pair_curves, b.solo_curves)} == {
        together.solo_curves[0][0]
    }
    assert all(about["training_seconds"] > 0 for about in found.document["runs"])


def test_a_finished_run_of_the_same_settings_is_taken_whatever_its_name(beton: Path, tmp_path: Path) -> None:
    wanted, _, alone = plan([evaluated(beton)], [0])
    assert locate(wanted, tmp_path).path == tmp_path / "tiny-seed-0"
    done(tmp_path, "other-seed", evaluated(beton, seed=1))
    done(tmp_path, "longer", evaluated(beton, seed=0, optim__epochs=4))
    RunDirectory.create(tmp_path / "unfinished", evaluated(beton, seed=0))
    assert locate(wanted, tmp_path).path == tmp_path / "tiny-seed-0"
    made = tiny_config(beton, seed=0, name="by-hand", logging__every_steps=9)  # measured otherwise: no matter
    assert locate(wanted, tmp_path) != done(tmp_path, "by-hand", made)
    assert locate(wanted, tmp_path).path == tmp_path / "by-hand"
    done(tmp_path, "alone", solo(made, "vit"))
    assert locate(alone, tmp_path).path == tmp_path / "alone"


def test_what_cannot_work_is_told_before_anything_is_trained(beton: Path, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "tiny-seed-0", evaluated(beton, seed=0, optim__epochs=4))
    with pytest.raises(UserError, match=r"tiny-seed-0: exists with another configuration, optim.epochs differs"):
        run([evaluated(beton)], [0], ["knn"], tmp_path, 1, print)
    with pytest.raises(UserError, match="--task knm: expected knn"):
        run([evaluated(beton)], [1], ["knm"], tmp_path, 1, print)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-seed-0"]


def test_a_run_is_found_again_by_relative_paths(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(beton.parent)
    names = {"train": Path("train.beton"), "evaluation__train": "train.beton", "evaluation__test": "test.beton"}
    config = tiny_config(**names)
    run = prepare(config, tmp_path, resume=False, world_size=1)
    assert run.config() != config
    assert locate(config, tmp_path).path == run.path
    other = tiny_config(**{**names, "train": Path("test.beton")})
    with pytest.raises(UserError, match=r"data\.train differs"):
        locate(other, tmp_path)
