"""`mokd init`: configurations that fit the images and the machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from launcher.cli.console import find_config
from launcher.first_steps.init import PAIRS, Found, Machine, configuration, fitting_pair, look
from mokd.config import RunConfig, load_config
from mokd.runs.run_directory import RunDirectory
from mokd.training.feasibility import check
from tests.support import mokd

CONFIGS = find_config("demo.yaml").parent
IMAGENET, FEW = Found(1_281_167, 375, True), Found(40, 40, True)


def made(pair: str, found: Found, machine: Machine, test: Path | None = Path("test.beton")) -> RunConfig:
    text = configuration("mine", pair, Path("train.beton"), test, found, machine, CONFIGS, Path("mine.yaml"))
    assert "# weight: lambda" in text
    return schema.validate(RunConfig, schema.parse_yaml(text), "mine.yaml")


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_makes_a_whole_configuration(pair: str) -> None:
    for found, machine in ((IMAGENET, Machine(8, 96)), (FEW, Machine(0, 2))):
        config = made(pair, found, machine)
        ranks = max(1, machine.gpus)
        assert config.optim.global_batch % ranks == 0
        assert config.optim.global_batch <= max(found.size, 2 * ranks)
        assert config.data.workers == machine.cores // ranks
        assert max(config.evaluation.knn.k) <= found.size
        assert str(config.evaluation.test) == "test.beton"


def test_prototypes_follow_the_number_of_images() -> None:
    pair = "resnet50,vit_small"
    prototypes = [
        schema.parse_yaml(made(pair, Found(n, 300, True), Machine(4, 48)).model_dump_json())["objective"]["prototypes"]
        for n in (1_281_167, 130_000, 1000)
    ]
    assert prototypes == [32768, 4096, 256]


def test_images_without_labels_are_not_evaluated() -> None:
    assert made("resnet18,vit_tiny", Found(1000, 32, False), Machine(1, 8)).evaluation.every_epochs is None
    assert made("resnet18,vit_tiny", FEW, Machine(1, 8), None).evaluation.every_epochs is None


def test_the_pair_that_is_proposed_fits() -> None:
    assert fitting_pair(IMAGENET, Machine(8, 96)) == "resnet50,vit_small"
    assert fitting_pair(FEW, Machine(1, 8)) == "resnet18,vit_tiny"
    assert fitting_pair(FEW, Machine(0, 2)) == "resnet10,vit_nano"
    with pytest.raises(UserError, match="pair a,b: expected one of resnet50,vit_small; "):
        made("a,b", FEW, Machine(0, 2))


def test_images_of_four_channels(tmp_path: Path) -> None:
    generator, folder = np.random.default_rng(0), tmp_path / "train"
    for i in range(24):
        path = folder / f"class_{i % 2}" / f"{i}.npy"
        path.parent.mkdir(exist_ok=True, parents=True)
        np.save(path, generator.integers(0, [60, 120, 180, 240], (40, 50, 4)).astype(np.uint8))
    beton = tmp_path / "train.beton"
    convert([folder], beton, ConvertOptions(channels=4))
    for data, more in ((beton, []), (folder, ["--channels", "4"])):
        file = tmp_path / f"{data.name}.yaml"
        written = mokd("init", file, "--data", data, "--pair", "resnet10,vit_nano", *more)
        assert written.returncode == 0, written.stderr
        assert f"of all: mokd convert --statistics {data}" in written.stdout
        config = load_config(file)
        assert (config.data.channels, config.views.grey_probability, config.views.jitter.hue) == (4, 0.0, 0.0)
        assert config.views.mean == pytest.approx([0.115, 0.233, 0.35, 0.468], abs=0.01)
        assert config.views.std == pytest.approx([0.068, 0.136, 0.203, 0.271], abs=0.01)
        assert config.views.jitter.brightness == 0.4  # what is not of colours stays
    check(load_config(tmp_path / "train.beton.yaml"), 1)


def test_what_is_written_trains(beton: Path, tmp_path: Path) -> None:
    assert look(beton).side_px == 48
    written = mokd("init", "mine.yaml", "--data", beton, "--pair", "resnet10,vit_nano", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert "mokd train mine.yaml --nproc 1" in written.stdout
    again = mokd("init", "mine.yaml", "--data", beton, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == "error: mine.yaml: exists already; give another name, or --overwrite\n"
    missing = mokd("init", "other.yaml", cwd=tmp_path)
    assert (missing.returncode, missing.stderr) == (2, "error: --data is missing: where are the training images?\n")
    trained = mokd("train", "mine.yaml", "optim.max_steps=2", "optim.warmup_epochs=0", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert RunDirectory(tmp_path / "runs" / "mine").read_status()["state"] == "done"
