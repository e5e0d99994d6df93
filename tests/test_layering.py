"""Imports run downwards only, and reading a configuration needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.support import ROOT

LAYERS = ("data_pipeline", "mokd", "launcher")


@pytest.mark.parametrize("package", LAYERS)
def test_nothing_imports_upwards(package: str) -> None:
    above = {*LAYERS[LAYERS.index(package) + 1 :], "tests", "benchmarks"}
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{file}: relative import"
                modules = [node.module]
            for module in modules:
                assert module.split(".")[0] not in above, f"{file}:{node.lineno} imports {module}"


@pytest.mark.parametrize(
    "module", ["mokd.config", "mokd.run_directory", "mokd.gain", "launcher.cli", "launcher.config"]
)
def test_schema_and_command_line_import_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
