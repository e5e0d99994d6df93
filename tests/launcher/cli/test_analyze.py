"""`mokd analyze` on a trained tiny pair and its baselines: every file, and the numbers in them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from launcher.cli import main as cli
from launcher.report.build import build_report
from mokd.evaluation import results
from mokd.evaluation.cache import open_features
from mokd.runs.files import read_json
from mokd.runs.run_directory import RunDirectory
from mokd.training.start import train
from tests.support import RESNET, VIT, tiny_config

NAMES = (
    *("distance", "receptive_fields", "cka", "rank", "agreement", "tsne", "attention"),
    *("search_resnet_in_vit", "search_vit_in_resnet", "pca", "neighbors"),
)


@pytest.fixture(scope="module")
def root(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained pair with checkpoints of two steps, and one baseline."""
    root = tmp_path_factory.mktemp("runs")
    evaluation = {"train": str(beton), "test": str(beton.with_name("test.beton")), "resize_px": 36, "crop_px": 32}
    changes: dict[str, Any] = {"evaluation": evaluation, "checkpoint": {"every_steps": 1, "keep_last": 2}}
    for name, branches in (("pair", [RESNET, VIT]), ("solo-vit", [VIT])):
        config = tiny_config(beton, name=name, branches=branches, optim__max_steps=2, **changes)
        assert train(config, root, resume=False, nproc=1)[1] == 0
    return root


def analyze(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    cli.app(["analyze", *map(str, arguments), "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    """What an analysis of everything has written."""
    arguments = ["--solo", root / "solo-vit", "--images", 3, "--samples", 24]
    cli.app(["analyze", *map(str, [root / "pair", *arguments])], standalone_mode=False)
    return root / "pair" / "analysis" / "teacher-step-2"


def test_everything_is_written_and_can_be_read(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {f"{n}.{kind}" for n in NAMES for kind in ("png", "svg", "json")}
    for name in NAMES:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 200
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
            alt = picture.text["Description"]  # type: ignore[attr-defined]
        assert ET.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
        numbers = read_json(folder / f"{name}.json")
        assert numbers["alt"] == alt
        assert [(n["branch"], n["alone"], n["step"]) for n in numbers["networks"]] == [
            ("resnet", False, 2),
            ("vit", False, 2),
            ("vit", True, 2),
        ]


def test_the_numbers_of_a_run(root: Path, folder: Path) -> None:
    distance = read_json(folder / "distance.json")
    assert set(distance["attention_distance_px"]) == {"vit", "vit alone"}
    assert [len(heads) for heads in distance["attention_distance_px"]["vit"].values()] == [3, 3]
    assert set(distance["field_distance_px"]) == {"resnet", "vit", "vit alone"}

    (pair,) = read_json(folder / "agreement.json")["pairs"]
    written = results.read(results.result_path(root / "pair" / "eval", "knn", "teacher", 2))
    first, second = (written.predictions[f"{name}/k=20"] for name in ("resnet", "vit"))
    assert pair["agree"] == np.mean(first == second)
    assert pair["only_first"] == np.mean((first == written.labels) & (second != written.labels))
    shares = [pair[key] for key in ("both_right", "only_first", "only_second", "both_wrong")]
    assert sum(shares) == pytest.approx(1.0)

    (pair,) = read_json(folder / "cka.json")["pairs"]
    assert np.shape(pair["cka"]) == (len(pair["first_layers"]), len(pair["second_layers"])) == (5, 3)
    assert len(read_json(folder / "tsne.json")["places"]["vit alone"]) == 24
    rank = read_json(folder / "rank.json")["effective_rank"]
    assert all(1.0 <= network["rank_me"] <= network["largest"] for network in rank.values())
    looks = np.array(read_json(folder / "search_resnet_in_vit.json")["looks"])
    assert looks.shape == (3, 2, 4, 4)
    assert np.allclose(looks.sum(axis=(2, 3)), 1.0, atol=1e-3)


def test_neighbors_are_scikit_learns(root: Path, folder: Path) -> None:
    sets = {}
    for place in (root / "pair" / "eval" / "features").iterdir():
        if read_json(place / "index.json")["subject"]["backbone"] == VIT["backbone"]:
            found = open_features(place)
            sets[found.size] = found.take(np.arange(found.size)).numpy()
    theirs = NearestNeighbors(n_neighbors=5, metric="cosine").fit(sets[160])
    for entry in read_json(folder / "neighbors.json")["images"]:
        expected = theirs.kneighbors(sets[40][[entry["sample"]]])[0][0]
        assert [1.0 - near["cosine"] for near in entry["neighbors"]["vit"]] == pytest.approx(expected, abs=1e-5)


def test_the_report_shows_the_pictures_with_their_words(root: Path, folder: Path) -> None:
    page = build_report([RunDirectory.open(root / "pair")])
    assert "<h4>teacher-step-2</h4>" in page
    assert page.count("data:image/png;base64,") == len(NAMES)
    assert 'alt="k-NN predictions for 40 images: resnet and vit predict the same class' in page


def test_an_older_step_of_the_student(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--network", "student", "--step", "1", "--what", "rank,pca", "--name", "early", "--branch", "vit"]
    found = analyze(root / "pair", *arguments, capsys=capsys)
    assert [finding["part"] for finding in found["findings"]] == ["rank", "pca"]
    written = read_json(root / "pair" / "analysis" / "early" / "rank.json")
    assert [(n["branch"], n["network"], n["step"]) for n in written["networks"]] == [("vit", "student", 1)]


def test_a_file_of_weights(root: Path, beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), file)
    sizes = ("evaluation.resize_px=36", "evaluation.crop_px=32", "views.global_crops.size_px=32")
    options = [option for size in sizes for option in ("--set", size)]
    data = ["--train", str(beton), "--test", str(beton.with_name("test.beton"))]
    arguments = [*options, *data, "--backbone", "resnet10t", "--images", "2", "--samples", "16"]
    found = analyze(file, *arguments, capsys=capsys)
    assert set(found["left_out"]) == {"cka", "agreement", "attention", "search"}
    assert (tmp_path / "weights.safetensors.analysis" / "weights" / "distance.png").is_file()
    assert {finding["part"] for finding in found["findings"]} == {"distance", "rank", "tsne", "pca", "neighbors"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "not a run directory"),
        (["pair", "--what", "beauty"], "expected some of distance,cka"),
        (["pair", "--step", "7"], "no whole checkpoint of step 7; there are those of steps 1, 2"),
        (["pair", "--network", "scratch", "--step", "1"], "only a run's trained networks have steps"),
        (["pair", "--branch", "swin"], "no branch 'swin'"),
        (["pair", "--branch", "vit", "--what", "agreement"], "compares two branches, and there is one"),
        (["pair", "--solo", "nothing"], "not a run directory"),
        (["pair", "--solo", "pair"], "expected a run of one of resnet, vit alone"),
        (["pair", "--solo", "solo-vit", "--solo", "solo-vit"], "two runs of branch 'vit'"),
        (["pair", "--name", "../x"], "it names a folder"),
        (["pair", "--device", "tpu"], "expected auto or cpu or cuda"),
        (["pair", "--network", "scratch", "--what", "search"], "an untrained network has none"),
        (["solo-vit", "--what", "search"], "there is one"),
        (["pair", "--test", "none.beton"], "none.beton: no such file"),
    ],
)
def test_a_mistake_is_one_line(
    root: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    capsys.readouterr()
    before = set(root.rglob("analysis/*"))
    with pytest.raises(SystemExit) as end:
        cli.main(["analyze", *arguments])
    out, err = capsys.readouterr()
    assert (end.value.code, out, len(err.splitlines())) == (2, "", 1), err
    assert said in err
    assert set(root.rglob("analysis/*")) == before


def test_without_scikit_learn(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # a stand-in for an installation without it: the tests need it themselves
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["analyze", str(root / "pair"), "--what", "tsne"])
    assert end.value.code == 2
    assert "needs scikit-learn: pip install 'mokd[analyze]'" in capsys.readouterr().err
