"""Every command in the fenced blocks of README and docs is run, on tiny data, in the order of the pages.

`tests/documented.py` says how. A command without a rule there fails, and so does a rule without a command.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.beton.synthetic import generate
from data_pipeline.core import schema
from mokd.config import RunConfig
from tests.documented import PAGES, RULES
from tests.support import RESNET, ROOT, SEED, VIT, frozen, tiny
from tests.test_docs import fenced_commands, parse


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny images and configurations under the names that the pages have."""
    place = tmp_path_factory.mktemp("pages")
    generate(place / "images", classes=4, per_class_train=10, per_class_test=4, size_px=48)
    train, test = place / "images" / "train", place / "images" / "test"
    for source, names in (
        (train, ("imagenet/train", "photos/train", "a")),
        (test, ("imagenet/val", "photos/test", "b")),
    ):
        for name in names:
            shutil.copytree(source, place / name)
    shutil.copytree(test, place / "xray")
    (place / "mokd.sif").touch()
    _other_sources(place, sorted(train.rglob("*.*")))
    for name, changes in _configurations(place).items():
        raw = tiny(place / "data/imagenet/train.beton", name=name, **changes)
        (place / f"{name}.yaml").write_text(schema.dump_yaml(schema.validate(RunConfig, raw, name)))
    return place


def _other_sources(place: Path, images: list[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in ("shards", "cifar100", "sentinel/water", "sentinel/wood"):
        (place / folder).mkdir(parents=True)
    with tarfile.open(place / "shards/train-0.tar", "w") as tar:
        for number, image in enumerate(images[:8]):
            (place / "label").write_text(str(number % 2))
            tar.add(image, f"{number}.jpg")
            tar.add(place / "label", f"{number}.cls")
    rows = [{"bytes": image.read_bytes(), "path": image.name} for image in images[:8]]
    table = pa.table({"img": rows, "fine_label": [number % 2 for number in range(8)]})
    pq.write_table(table, place / "cifar100/train-00000-of-00001.parquet")
    lines = [f"{image.relative_to(place)},{image.parent.name}\n" for image in images]
    (place / "train.csv").write_text("path,class\n" + "".join(lines))
    draw = np.random.default_rng(0)
    for number, kind in enumerate(("water", "wood") * 5):
        np.save(place / f"sentinel/{kind}/{number}.npy", draw.integers(0, 255, (40, 40, 13), dtype=np.uint8))
    for image in (place / "xray").rglob("*.*"):
        Image.open(image).convert("L").save(image)


def _configurations(place: Path) -> dict[str, dict[str, Any]]:
    """Changes to the tiny configuration, by name."""

    def pair(cnn: str, vit: str) -> dict[str, Any]:
        return {"branches": [{**RESNET, "name": cnn}, {**VIT, "name": vit}], **usual}

    evaluation = {
        "train": str(place / "data/imagenet/train.beton"),
        "test": str(place / "data/imagenet/val.beton"),
        "resize_px": 36,
        "crop_px": 32,
        "linear": {"epochs": 2},
        "transfer": {"epochs": 1},
        "semi": {"epochs": 1, "fractions": [0.5]},
    }
    usual: dict[str, Any] = {"optim__max_steps": 2, "evaluation": evaluation, "parallel": {"device": "cpu"}}
    partner = {**RESNET, "name": "resnet50"}
    return {
        "vit_s_resnet50": pair("resnet50", "vit_s") | {"parallel": {}},
        "cifar10_cpu": pair("resnet10", "vit_tiny"),
        "C": pair("resnet18", "vit_tiny") | {"parallel": {}},
        "bands": pair("resnet50", "vit_s") | {"data": {"train": str(place / "sentinel.beton"), "workers": 1}},
        "partner": {**usual, "branches": [partner]},
        "seed": {
            **usual,
            **SEED,
            "branches": [{**VIT, "name": "vit_s"}, frozen(partner, Path("run:runs/partner/resnet50"))],
        },
        "pair": pair("resnet50", "vit_s"),
    }


@pytest.fixture(scope="module")
def results(workplace: Path) -> dict[str, dict[str, Any]]:
    """What became of every command that is run, by its text; each is run once."""
    import timm
    import torch

    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), workplace / "resnet.pth")
    runs = dict.fromkeys(run for page in PAGES for command in RULES[page] for run in _runs(page, command))
    found: dict[str, dict[str, Any]] = {}
    for run in (run for run in runs if run.startswith("make ")):
        done = subprocess.run(shlex.split(run), cwd=ROOT, capture_output=True, text=True, check=False)
        found[run] = {"status": done.returncode, "output": done.stdout + done.stderr}
    # files of a pattern are there only once the commands before have run: the program looks for them itself
    own = [run for run in runs if run.startswith("mokd ")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "XDG_CONFIG_HOME": str(workplace / "config"),
        "PATH": str(_programs(workplace / "bin")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.run_commands"],
        input="".join(f"{json.dumps(shlex.split(run)[1:])}\n" for run in own),
        cwd=workplace, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return found | dict(zip(own, map(json.loads, done.stdout.splitlines()), strict=True))


def _programs(folder: Path) -> Path:
    """A search path without SLURM's programs: not even a cluster that runs on this machine is asked."""
    folder.mkdir()
    for name in ("sh", "bash", "env", "git", "cc", "gcc", "g++", "uname", "cat", "ls"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


def _runs(page: str, command: str) -> tuple[str, ...]:
    rule = RULES[page][command]
    return (command,) if rule is None else rule.runs


def documented(page: str) -> Iterator[str]:
    return fenced_commands((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_a_rule(page: str) -> None:
    assert dict.fromkeys(documented(page)).keys() == RULES[page].keys()


def test_every_page_is_looked_at() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "slurm/README.md"]
    with_commands = {str(page.relative_to(ROOT)) for page in pages if [*documented(str(page.relative_to(ROOT)))]}
    assert with_commands <= {*PAGES}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page: str, results: dict[str, dict[str, Any]]) -> None:
    failed = []
    for command, rule in RULES[page].items():
        for run in _runs(page, command):
            result = results[run]
            if result["status"] not in (rule.statuses if rule else (0,)):
                failed.append(f"{command}\n  {run}\n  status {result['status']}\n{result['output'][-3000:]}")
            if run.startswith("make -n"):
                for line in result["output"].splitlines():
                    words = shlex.split(line.lstrip("@")) if "/mokd " in line else []
                    if words and words[0].endswith("/mokd"):
                        parse(words[1:])
    assert not failed, "\n\n".join(failed)
