"""`mokd compare` on run directories as training and `mokd eval` leave them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.core.errors import UserError
from launcher.report.build import build_report
from launcher.report.summary import list_runs
from mokd.comparison.gain import compare, knn_curve
from mokd.comparison.pairing import Run
from mokd.comparison.plots import plot
from mokd.comparison.solo import solo
from mokd.evaluation import results
from mokd.evaluation.results import Evaluation
from mokd.runs.run_directory import RunDirectory
from tests.support import CONTRASTIVE, mokd, tiny_config

IMAGES, STEP = 1000, 15
# share of the images that a branch has right
ACCURACY = {"pair": {"resnet": 0.55, "vit": 0.6}, "solo": {"resnet": 0.5, "vit": 0.6}}

Write = Callable[..., Path]


def evaluate(
    run: Path,
    step: int,
    right: dict[str, float],
    task: str = "knn",
    images: int = IMAGES,
    protocol: str = "",
    settings: tuple[float, float] = (10, 20),
) -> None:
    """Leaves an evaluation in which each branch has the first images of each class right."""
    labels = np.arange(images) % 10
    predictions, records = {}, []
    for branch, share in right.items():
        for k, less in zip(settings, (0.1, 0.0), strict=True):  # the headline is not the first
            wrong = np.arange(images) >= round((share - less) * images)
            predictions[f"{branch}/k={k}"] = (labels + wrong) % 10
            top1 = 100.0 * (share - less)
            facts = {"network": "teacher", "task": task, results.SETTINGS[task]: k, "top1": top1, "top5": 100.0}
            about = {"step": step, "predictions": f"{branch}/k={k}", "headline": k == settings[-1]}
            records.append({"branch": branch, **facts, **about})
    folder = RunDirectory(run).evaluations
    about = (task, "teacher", step, f"step-{step}", "test.beton", images)
    protocols = dict.fromkeys(right, protocol) if protocol else {}
    evaluation = Evaluation(*about, records, labels.astype(np.int64), predictions, protocols=protocols)
    results.write(results.result_path(folder, task, "teacher", step), evaluation)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a finished run with curves and evaluations."""

    def made(name: str, branch: str | None = None, shift: float = 0.0, **changes: Any) -> Path:
        config = tiny_config(name=name, **changes)
        config = config if branch is None else solo(config, branch)
        run = RunDirectory.create(tmp_path / config.name, config)
        share = ACCURACY["pair" if branch is None else "solo"]
        lines = [
            {"step": 5 * n, **{f"eval/{b.name}/knn_top1": 20.0 + 8 * n * share[b.name] for b in config.branches}}
            for n in range(4)
        ]
        run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 15, "epoch": 2}]))
        evaluate(run.path, 5, {b.name: 0.3 for b in config.branches})  # an older one
        evaluate(run.path, STEP, {b.name: share[b.name] + shift for b in config.branches})
        return run.path

    return made


def whole(write: Write, **changes: Any) -> list[Path]:
    return [write(branch=branch, **{"name": "pair", **changes}) for branch in (None, "resnet", "vit")]


def opened(paths: list[Path]) -> list[Run]:
    return [Run.open(path) for path in paths]


def test_the_command_prints_json_and_draws(write: Write, tmp_path: Path) -> None:
    runs = whole(write)
    picture = tmp_path / "gain.png"
    done = mokd("compare", *[run.name for run in runs], "--json", "--plot", picture, cwd=_with_runs(tmp_path, runs))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["task"], found["images"], found["resamples"]) == ("knn", IMAGES, 10_000)
    assert found["methods"] == [{"label": "dino", "branches": found["branches"]}]
    resnet, vit = found["branches"]["resnet"], found["branches"]["vit"]
    assert {"solo", "pair", "gain", "ci95"} <= resnet.keys()
    assert (resnet["solo"], resnet["pair"], resnet["gain"]) == (50.0, 55.0, 5.0)
    # the first half of the images is right in both: 5% of the images make the difference
    error = 100 * (0.05 * 0.95 / IMAGES) ** 0.5
    assert resnet["ci95"] == pytest.approx([5 - 1.96 * error, 5 + 1.96 * error], abs=0.15)
    assert (vit["gain"], vit["ci95"]) == (0.0, [0.0, 0.0])
    assert vit["seeds"] == {"pair": [3], "solo": [3]}
    assert [(r["side"], r["k"], r["step"]) for r in vit["runs"]] == [("pair", 20, STEP), ("solo", 20, STEP)]
    assert picture.read_bytes().startswith(b"\x89PNG")

    table = mokd("compare", *runs)
    assert table.returncode == 0, table.stderr
    assert "+5.00" in table.stdout
    assert "dino: k-NN, top-1 of the teacher" in table.stdout


def test_another_setting_than_the_headlines(write: Write) -> None:
    runs = whole(write)
    found = compare(opened(runs), task="knn", network="teacher", at=10)
    gain = found.methods[0].branches["resnet"].gain
    assert (found.document()["at"], gain.solo, gain.pair) == (10, pytest.approx(40.0), pytest.approx(45.0))
    table = mokd("compare", *runs, "--at", "10")
    assert table.returncode == 0, table.stderr
    assert "dino: k-NN (k 10), top-1 of the teacher" in table.stdout
    with pytest.raises(UserError, match="no knn of resnet with k 7; there are: 10, 20"):
        compare(opened(runs), task="knn", network="teacher", at=7)
    for run in runs:  # under a name of its own, as `mokd eval --name` leaves it
        folder = RunDirectory(run).evaluations
        named = results.read(results.result_path(folder, "knn", "teacher", STEP))
        results.write(results.result_path(folder, "own", "teacher", STEP), named)
    assert compare(opened(runs), task="own", network="teacher", at=10).title == "own (at 10)"


def _with_runs(folder: Path, runs: list[Path]) -> Path:
    """A working directory in which bare names lead to the runs."""
    (folder / "here" / "runs").mkdir(parents=True)
    for run in runs:
        (folder / "here" / "runs" / run.name).symlink_to(run)
    return folder / "here"


def test_several_seeds_and_objectives(write: Write, tmp_path: Path) -> None:
    runs = []
    for seed, shift in ((0, 0.0), (1, 0.1), (2, -0.1)):
        runs += whole(write, name=f"dino-{seed}", seed=seed, shift=shift)
    runs += whole(write, name="con", seed=0, **CONTRASTIVE)
    found = compare(opened(runs), task="knn", network="teacher", resamples=2000)
    assert [method.label for method in found.methods] == ["dino", "contrastive"]
    dino, contrastive = (method.branches["resnet"] for method in found.methods)
    assert dino.gain.pair == pytest.approx(55.0)
    # luck that a seed brings to both sides widens the accuracies, not the gain
    assert dino.gain.pair_ci95[1] - dino.gain.pair_ci95[0] > 10
    assert dino.gain.gain_ci95[1] - dino.gain.gain_ci95[0] < 4
    assert [(r["side"], r["seed"]) for r in dino.runs] == [(side, n) for side in ("pair", "solo") for n in range(3)]
    assert contrastive.gain.gain == pytest.approx(5.0)
    document = json.loads(json.dumps(found.document()))
    assert document["branches"] == document["methods"][0]["branches"]
    assert document["branches"]["resnet"]["seeds"] == {"pair": [0, 1, 2], "solo": [0, 1, 2]}
    plot(found, tmp_path / "several.png")
    assert (tmp_path / "several.png").stat().st_size > 10_000


def test_curves_are_those_of_the_branch(write: Write) -> None:
    run = write("pair")
    assert knn_curve(run, "vit") == [(0, 20.0), (5, 24.8), (10, 29.6), (15, 34.4)]
    assert knn_curve(run, "other") == []


def test_few_labels_are_compared_at_one_fraction(write: Write) -> None:
    runs = whole(write)
    for run, side, fractions in zip(
        runs, ("pair", "solo", "solo"), ((0.01, 0.5), (0.01, 0.1), (0.01, 0.1)), strict=True
    ):
        evaluate(
            run,
            STEP,
            {b.name: ACCURACY[side][b.name] for b in Run.open(run).config.branches},
            "semi",
            settings=fractions,
        )
    with pytest.raises(UserError, match=r"largest fraction of resnet's labels is not the same for all: 0\.1, 0\.5"):
        compare(opened(runs), task="semi", network="teacher")
    gain = compare(opened(runs), task="semi", network="teacher", at=0.01).methods[0].branches["resnet"].gain
    assert (gain.solo, gain.pair) == (pytest.approx(40.0), pytest.approx(45.0))


def test_bars_and_curves_are_of_one_k(write: Write, tmp_path: Path) -> None:
    runs = whole(write)
    older = compare(opened(runs), task="knn", network="teacher")
    assert older.methods[0].branches["vit"].curve_k is None
    for run in runs:  # as runs record it now: the best k, and the headline's
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        best = {key: value for record in records for key, value in record.items() if key.startswith("eval/")}
        records += [{"step": STEP, **{f"{key}_k20": value - 1.0 for key, value in best.items()}}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = compare(opened(runs), task="knn", network="teacher")
    vit = found.methods[0].branches["vit"]
    assert vit.curve_k == 20
    assert vit.pair_curves == vit.solo_curves == {3: [(STEP, pytest.approx(33.4))]}
    other = compare(opened(runs), task="knn", network="teacher", at=10)
    assert other.methods[0].branches["vit"].curve_k is None  # curves of k 10 are not on record
    for comparison, title, axis in (
        (older, "k-NN (k 20)", "top-1 (%), best k"),
        (found, "k-NN (k 20)", "top-1 (%), k 20"),
        (other, "k-NN (k 10)", "top-1 (%), best k"),
    ):
        plot(comparison, tmp_path / "gain.svg")
        drawn = (tmp_path / "gain.svg").read_text()  # text is drawn as shapes, with a comment that says it
        assert f"<!-- {title} -->" in drawn
        assert f"<!-- {axis} -->" in drawn


def test_what_is_not_on_record_is_answered_with_the_command(write: Write, tmp_path: Path) -> None:
    runs = whole(write)
    done = mokd("compare", *runs, "--task", "linear")
    assert done.returncode == 2
    assert f"run: mokd eval {runs[0]} --task linear" in done.stderr
    assert "Traceback" not in done.stderr
    assert mokd("compare", *runs, "--plot", tmp_path / "none" / "x.png").returncode == 2
    with pytest.raises(UserError, match=f"mokd eval {runs[0]} --task knn --network student"):
        compare(opened(runs), task="knn", network="student")
    evaluate(runs[0], STEP, {"resnet": 0.5})
    with pytest.raises(UserError, match="knn on record, but not of vit"):
        compare(opened(runs), task="knn", network="teacher")


def test_other_test_images_and_other_steps_are_refused(write: Write) -> None:
    runs = whole(write)
    evaluate(runs[2], STEP, {"vit": 0.6}, images=900)
    with pytest.raises(UserError, match=r"tested on test.beton \(900 images\)") as caught:
        compare(opened(runs), task="knn", network="teacher", force=True)
    assert "evaluate all on the same" in str(caught.value)
    evaluate(runs[2], STEP, {"vit": 0.6})
    evaluate(runs[2], STEP + 1, {"vit": 0.6})
    with pytest.raises(UserError, match=r"evaluated at step 16, .* at step 15"):
        compare(opened(runs), task="knn", network="teacher")
    found = compare(opened(runs), task="knn", network="teacher", force=True)
    assert len(found.remarks) == 1


def test_other_protocols_are_refused(write: Write) -> None:
    runs = whole(write)
    evaluate(runs[0], STEP, ACCURACY["pair"], protocol="one")
    evaluate(runs[1], STEP, {"resnet": 0.5}, protocol="one")
    assert compare(opened(runs), task="knn", network="teacher").remarks == []  # of the third it is not known
    evaluate(runs[2], STEP, {"vit": 0.6}, protocol="other")
    with pytest.raises(UserError, match=f"{runs[2]} was evaluated with other settings .* than {runs[0]}"):
        compare(opened(runs), task="knn", network="teacher")
    assert len(compare(opened(runs), task="knn", network="teacher", force=True).remarks) == 1
    evaluate(runs[0], STEP, ACCURACY["pair"], protocol="another")  # two branches, one remark
    found = compare(opened(runs), task="knn", network="teacher", force=True)
    assert len(found.remarks) == len(set(found.remarks)) == 2


def test_methods_may_be_of_different_length(write: Write) -> None:
    longer = whole(write, name="con", **CONTRASTIVE)
    for run, branch in zip(longer, (("resnet", "vit"), ("resnet",), ("vit",)), strict=True):
        evaluate(run, STEP + 5, dict.fromkeys(branch, 0.7))
    found = compare(opened([*whole(write), *longer]), task="knn", network="teacher")
    assert found.remarks == []
    assert [run["step"] for method in found.methods for run in method.branches["vit"].runs] == [STEP] * 2 + [
        STEP + 5
    ] * 2


def test_runs_that_do_not_belong_together_are_refused(write: Write) -> None:
    runs = [*whole(write)[:2], write("short", "vit", optim__epochs=2)]
    done = mokd("compare", *runs)
    assert done.returncode == 2
    assert "optim.epochs is 2 there, 3 here" in done.stderr
    forced = mokd("compare", *runs, "--force", "--json")
    assert forced.returncode == 0
    assert "warning:" in forced.stderr
    assert len(json.loads(forced.stdout)["remarks"]) == 1


def test_a_report_and_the_table_of_runs_show_the_gain_over_baselines_beside_a_pair(
    write: Write, tmp_path: Path
) -> None:
    pair, *alone = whole(write)
    write("other", seed=9)  # without baselines
    (listed,) = [line for line in list_runs(tmp_path) if line.run == str(pair)]
    assert listed.gain == {"resnet": pytest.approx(5.0), "vit": pytest.approx(0.0)}
    assert "resnet +5.00, vit +0.00" in listed.cells()
    assert all(line.gain == {} for line in list_runs(tmp_path) if line.run != str(pair))
    page = build_report([RunDirectory.open(pair)])
    assert "Gain over training alone" in page
    assert "dino: k-NN, top-1 of the teacher in %, 1,000 test images" in page
    assert re.search(r"resnet</th>.*50\.00.*55\.00.*\+5\.00.*\+3\.\d\d to \+6\.\d\d", page)
    assert f"no linear of the teacher on record; run: mokd eval {pair} --task linear" in page
    assert "Gain over" not in build_report([RunDirectory.open(alone[0])])
    assert "Gain over" not in build_report([RunDirectory.open(tmp_path / "other")])
