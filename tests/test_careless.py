"""What happens to the careless: early interruptions, runs of others, an empty terminal, samples that are damaged."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from data_pipeline.beton.format import open_beton
from mokd.runs.exit_codes import EXIT_FAILED
from mokd.runs.run_directory import RunDirectory
from tests.support import ROOT, mokd, tiny, tiny_config

# sends itself SIGINT when MODULE is imported, as whoever presses Ctrl-C early
INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
sys.meta_path.insert(0, Finder())
runpy.run_module("launcher.cli", run_name="__main__", alter_sys=True)
"""


def python(*arguments: str | Path, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config(beton: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny(beton, optim__max_steps=3, logging__every_steps=2)))
    return file


@pytest.mark.parametrize(("module", "status"), [("pydantic", -signal.SIGINT), ("torch", 128 + signal.SIGINT)])
def test_an_early_interruption_shows_no_traceback(module: str, status: int, config: Path, tmp_path: Path) -> None:
    program = INTERRUPTED.replace("MODULE", module)
    done = python("-c", program, "train", config, "--root", tmp_path / "runs")
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
def test_a_run_of_somebody_else_shows_no_traceback(config: Path, beton: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = RunDirectory.create(root / "tiny", tiny_config(beton))
    run.path.chmod(0)
    rights = "-dac_override,-dac_read_search"  # root reads everything, unless it gives that up
    before = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    try:
        for command in (["status", run.path], ["logs", run.path], ["train", config, "--root", root, "--resume"]):
            done = python("-m", "launcher.cli", *command, before=before)
            assert done.returncode in (1, 2), done.stderr
            assert "Traceback" not in done.stderr
            assert "not readable" in done.stderr or "Permission denied" in done.stderr
        assert python("-m", "launcher.cli", "status", "--root", root, before=before).returncode == 0
    finally:
        run.path.chmod(0o700)


def test_a_damaged_sample_ends_training_in_one_line(config: Path, beton: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.beton"
    for suffix in ("", ".manifest.jsonl"):
        shutil.copy(f"{beton}{suffix}", f"{own}{suffix}")
    info = open_beton(own)
    content = bytearray(own.read_bytes())
    for sample in range(info.size):
        at = content.index(info.read(sample))
        content[at + 40] ^= 255
    own.write_bytes(content)
    done = mokd("train", config, f"data.train={own}", "--root", tmp_path / "runs", "--nproc", "2")
    assert done.returncode == EXIT_FAILED
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("failed: ") and "sample" in line]


def test_a_terminal_shows_what_is_done_and_every_step(config: Path, tmp_path: Path) -> None:
    more = ["optim.epochs=12", "optim.max_steps=null", "logging.every_steps=100", "--root", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "launcher.cli", "train", str(config), *more]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm"})
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the end of a terminal
            break
    _, status = os.waitpid(process, 0)
    shown = seen.decode(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 0, shown
    marks = ["looking at images, networks", "starting 1 rank", "step 0/60  waiting for the first step", "step 60/60"]
    places = [shown.find(mark) for mark in marks]
    assert -1 not in places, shown
    assert places == sorted(places)
    # nothing is logged before the last step, and others are counted all the same
    assert {int(step) for step in re.findall(r"step (\d+)/60", shown)} - {0, 60}
