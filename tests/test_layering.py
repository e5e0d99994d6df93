"""Imports run downwards only, between packages and between their folders; reading a configuration needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

# packages and, in each, its rooms from the bottom up; a room imports only from those before it
ROOMS = {
    "data_pipeline": ("core", "config", "sampling", "transforms", "beton", "loaders"),
    "mokd": (
        *("config", "runs", "loggers", "distributed", "losses.kernels", "losses", "models", "optim", "objectives"),
        *("monitoring", "parallel", "checkpointing", "weights", "evaluation", "analysis", "training"),
        *("comparison", "export"),
    ),
    "launcher": ("config", "runs", "slurm", "preflight", "doctor", "report", "first_steps", "cli"),
}
OUTSIDE = ("tests", "benchmarks")


def problems(root: Path) -> list[str]:
    """What is wrong with the order of rooms below `root`: upward imports, circles, modules without a room."""
    found = []
    for package, rooms in ROOMS.items():
        for file in sorted((root / package).rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            room = room_of(name)
            if room is None and name != f"{package}.__init__":
                found.append(f"{name}: outside every room of {package}")
            for line, imported in imports(file, root):
                if imported in OUTSIDE or imported.partition(".")[0] in OUTSIDE:
                    found.append(f"{name}:{line}: imports {imported}")
                    continue
                other = imported.partition(".")[0]
                if other not in ROOMS:
                    continue
                if list(ROOMS).index(other) > list(ROOMS).index(package):
                    found.append(f"{name}:{line}: {package} imports {imported}")
                elif other == package and room is not None:
                    target = room_of(imported)
                    if target is not None and rooms.index(target) > rooms.index(room):
                        found.append(f"{name}:{line}: {room} imports {imported}, which is above it")
    return found


def room_of(module: str) -> str | None:
    """The innermost room that a module lies in: `losses.kernels` for `mokd.losses.kernels.cpu`."""
    package, _, rest = module.partition(".")
    inside = [room for room in ROOMS[package] if f"{rest}.".startswith(f"{room}.")]
    return max(inside, key=len, default=None)


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            assert node.module is not None
            # what is imported from a package may be a module of it
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_imports_run_downwards_and_every_module_has_a_room() -> None:
    assert problems(ROOT) == []


def planted(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """The problems of a tree with these files."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return problems(tmp_path)


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    assert planted(
        tmp_path, {"mokd/losses/kernels/cpu.py": "def f():\n    from mokd.losses import prototype_loss\n"}
    ) == ["mokd.losses.kernels.cpu:2: losses.kernels imports mokd.losses.prototype_loss, which is above it"]
    assert planted(tmp_path, {"mokd/losses/kernels/cpu.py": "import launcher.config\n"}) == [
        "mokd.losses.kernels.cpu:1: mokd imports launcher.config"
    ]


def test_a_circle_between_rooms_is_found(tmp_path: Path) -> None:
    files = {
        "launcher/runs/records.py": "from launcher.slurm import client\n",
        "launcher/slurm/client.py": "from launcher.runs import records\n",
    }
    assert planted(tmp_path, files) == [
        "launcher.runs.records:1: runs imports launcher.slurm.client, which is above it"
    ]


def test_a_module_outside_every_room_is_found(tmp_path: Path) -> None:
    assert planted(tmp_path, {"data_pipeline/helpers.py": "", "data_pipeline/misc/x.py": ""}) == [
        "data_pipeline.helpers: outside every room of data_pipeline",
        "data_pipeline.misc.x: outside every room of data_pipeline",
    ]


@pytest.mark.parametrize(
    "module",
    ["mokd.config", "mokd.runs.run_directory", "mokd.comparison.gain", "launcher.cli.main", "launcher.config"],
)
def test_schema_and_command_line_import_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
