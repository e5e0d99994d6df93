"""Exports are read back in processes of their own; what cannot be exported is refused and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.errors import UserError
from mokd.export import formats
from mokd.export.export import export
from mokd.export.formats import Format
from mokd.export.source import held_sources
from mokd.runs.run_directory import RunDirectory
from mokd.training.start import train
from tests.support import RESNET, ROOT, VIT, mokd, tiny_config

PLAIN = {key: value for key, value in RESNET.items() if key != "backbone_options"}
BRANCHES = [
    {**PLAIN, "name": "resnet18", "backbone": "resnet18"},
    VIT,
    {**PLAIN, "name": "convnext", "backbone": "convnext_atto", "backbone_options": {"depths": [1, 1, 1, 1]}},
    {**RESNET, "name": "small_stem", "stem": "cifar_stride2"},
]


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A ResNet, a ViT, a ConvNeXt and a ResNet with a stem of our own, after two steps."""
    config = tiny_config(beton, branches=BRANCHES, optim__max_steps=2, **SIZES)
    trained, status = train(config, tmp_path_factory.mktemp("runs"), resume=False, nproc=1)
    assert status == 0
    return trained


SIZES = {"views__global_crops__size_px": 64, "views__local_crops__size_px": 32}


def needed(kind: str) -> None:
    for name in formats.FORMATS[kind].needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install 'mokd[export]')")


@pytest.mark.parametrize(
    ("branch", "kind"),
    [
        *[(branch, kind) for branch in ("resnet18", "vit", "convnext") for kind in formats.FORMATS],
        ("small_stem", "timm"),
        ("small_stem", "safetensors"),
    ],
)
def test_exports_load_without_this_project(run: RunDirectory, tmp_path: Path, branch: str, kind: str) -> None:
    needed(kind)
    (done,) = export(run, branch, kind, "teacher", tmp_path / "out")
    assert done.difference < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "```python\nimport" in card
    assert "features = " in card
    assert "tiny" in card
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["crop_px"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_safetensors_hold_the_heads_of_the_student_that_is_asked_for(run: RunDirectory, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for network in ("student", "teacher"):
        list(export(run, "vit", "safetensors", network, tmp_path / network))
    student, teacher = (load_file(tmp_path / network / "model.safetensors") for network in ("student", "teacher"))
    assert any(key.startswith("t_head.") for key in student)
    assert any(not torch.equal(student[key], teacher[key]) for key in student)


def test_an_export_that_differs_is_refused(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = formats._timm_weights

    def damaged(source: object) -> dict[str, torch.Tensor]:
        return {key: value * 1.5 if value.ndim > 1 else value for key, value in own(source).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(formats, "_timm_weights", damaged)
    with pytest.raises(UserError, match="differ from the run's"):
        list(export(run, "resnet18", "timm", "teacher", tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "gguf"], "no such format; there are timm"),
        (["--format", "timm", "--branch", "swin"], "no branch 'swin'; there are resnet18, vit"),
        (["--format", "torchvision", "--branch", "small_stem"], "is no plain ResNet, vision transformer or ConvNeXt"),
        (["--format", "huggingface", "--branch", "small_stem"], "which timm alone does not build"),
        (["--format", "timm", "--network", "scratch"], "student or teacher"),
        (["--format", "timm", "--out", "x"], "give one --branch"),
    ],
)
def test_what_cannot_be_exported_ends_in_one_line(run: RunDirectory, arguments: list[str], said: str) -> None:
    if "huggingface" in arguments:
        needed("huggingface")
    done = mokd("export", run.path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    folder = run.path / "export"
    assert not folder.exists() or not list(folder.iterdir())


def test_an_export_is_replaced_only_when_told(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(export(run, "resnet18", "timm", "teacher", out))
    (out / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        list(export(run, "resnet18", "timm", "teacher", out))
    assert (out / "mine").exists()
    list(export(run, "resnet18", "timm", "teacher", out, replace=True))
    assert not (out / "mine").exists()


def test_the_page_gives_the_lines_that_are_run(run: RunDirectory) -> None:
    page = (ROOT / "docs" / "export.md").read_text()
    kinds = {(name, name): "resnet18" for name in formats.FORMATS}
    kinds |= {("torchvision", f"a {name} for torchvision"): b for name, b in OTHER_TORCHVISION.items()}
    for (kind, title), branch in kinds.items():
        with held_sources(run, branch, "teacher") as (source,):
            assert f"\n{title}:\n\n```python\n{formats.FORMATS[kind].load(source)}```\n" in page, title


OTHER_TORCHVISION = {"vision transformer": "vit", "ConvNeXt": "convnext"}


def test_lines_that_need_this_project_are_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = formats.FORMATS["timm"]
    ours = Format(own.write, lambda source: f"import mokd.models.backbones\n{own.load(source)}")
    monkeypatch.setitem(formats.FORMATS, "timm", ours)
    with pytest.raises(UserError, match="cannot be read back: ModuleNotFoundError"):
        list(export(run, "resnet18", "timm", "teacher", tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed here, without this project and what makes it importable: an environment of its own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    installed = Path(torch.__file__).parents[1]
    for entry in installed.iterdir():
        if not re.match(r"(__editable__|mokd|launcher|data_pipeline)", entry.name) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize("kind", list(formats.FORMATS))
@pytest.mark.parametrize("branch", ["resnet18", "vit", "convnext"])
def test_cards_lines_run_where_this_project_is_not_installed(
    run: RunDirectory, tmp_path: Path, elsewhere: Path, branch: str, kind: str
) -> None:
    needed(kind)
    list(export(run, branch, kind, "student", tmp_path / "out"))
    (lines,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    images = np.random.default_rng(3).normal(size=(3, 3, 64, 64)).astype("float32")
    np.save(tmp_path / "images.npy", images)
    program = "\n".join(
        [
            "import importlib.util, sys",
            f"sys.path.append({str(elsewhere)!r})",
            "assert not any(map(importlib.util.find_spec, ('mokd', 'launcher', 'data_pipeline')))",
            "import numpy",
            "images = numpy.load('../images.npy')",
            lines,
            "numpy.save('../features.npy', features)",
        ]
    )
    # -S: nothing is on the path but what is put there
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with held_sources(run, branch, "student") as (source,), torch.no_grad():
        own = source.backbone(torch.from_numpy(images)).pooled.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), own, rtol=1e-4, atol=1e-5 * np.abs(own).max())


def test_onnx_takes_other_numbers_and_where_the_network_allows_it_sizes(run: RunDirectory, tmp_path: Path) -> None:
    needed("onnx")
    import onnxruntime

    for branch, shapes in (
        ("resnet18", [(5, 64, 64), (1, 96, 80)]),
        ("convnext", [(1, 96, 64)]),
        ("vit", [(5, 64, 64)]),
    ):
        list(export(run, branch, "onnx", "teacher", tmp_path / branch))
        model = onnxruntime.InferenceSession(tmp_path / branch / "model.onnx", providers=["CPUExecutionProvider"])
        with held_sources(run, branch, "teacher") as (source,), torch.no_grad():
            for number, height, width in shapes:
                images = torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))
                own = source.backbone(images).pooled.numpy()
                (found,) = model.run(["features"], {"images": images.numpy()})
                np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-5 * np.abs(own).max())


def test_torchvision_builds_the_network_by_its_name(run: RunDirectory, tmp_path: Path) -> None:
    """What is written of a network that torchvision has a name for fits what it builds by that name."""
    import torchvision

    list(export(run, "resnet18", "torchvision", "teacher", tmp_path / "out"))
    model = torchvision.models.resnet18()
    answer = model.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True), strict=False)
    assert answer.unexpected_keys == []
    assert answer.missing_keys == ["fc.weight", "fc.bias"]
