"""What a run goes on from: never step 0 unasked, and what is wrong with a checkpoint is told apart."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import dump_yaml
from mokd.checkpointing import choose, storage
from mokd.checkpointing.reading import CheckpointUnreadableError, read_checkpoint
from mokd.runs.files import checksum
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from tests.mokd.checkpointing.test_checkpoint import SNAPSHOT
from tests.support import ROOT, mokd, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path / "run", tiny_config())
    directory.claim_attempt()
    return directory


def save(run: RunDirectory, *steps: int) -> None:
    for step in steps:
        assert storage.publish(run, 1, step, SNAPSHOT, {"identity": {}})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_without_any_whole_checkpoint_stops_until_a_restart_is_asked_for(beton: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    changes = {"optim__epochs": 2, "optim__max_steps": 6, "checkpoint__every_steps": 2}
    config.write_text(dump_yaml(tiny_config(beton, **changes)))
    command = ["train", config, "--root", tmp_path / "runs"]
    assert mokd(*command).returncode == 0
    run = RunDirectory(tmp_path / "runs" / "tiny")
    metrics = run.metrics_file.read_bytes()
    saved = sorted(path.name for path in run.checkpoints.glob("step-*"))
    assert saved == ["step-4", "step-6"]
    for name in saved:
        flip(run.checkpoints / name / "branch-vit.safetensors")
    refused = mokd(*command, "--resume")
    assert refused.returncode == 2
    assert "none of its checkpoints is whole (step-4, step-6)" in refused.stderr
    assert "--restart" in refused.stderr
    assert run.metrics_file.read_bytes() == metrics
    anew = mokd(*command, "--restart")
    assert anew.returncode == 0, anew.stderr
    kept = run.path / "before-restart-1"
    assert (kept / "metrics.jsonl").read_bytes() == metrics
    assert sorted(path.name for path in (kept / "checkpoints").glob("step-*")) == saved
    assert [record["step"] for record in read_metrics(run.metrics_file)] == [1, 2, 3, 4, 5, 6]


def test_the_rank_itself_stops_too_and_sets_the_damaged_aside(run: RunDirectory) -> None:
    save(run, 3, 4)
    for step in (3, 4):
        flip(storage.step_directory(run, step) / "objective.safetensors")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        choose.to_resume_from(run, 1, aside=True)
    aside = [f"damaged-step-{step}--objective.safetensors-has-changed" for step in (3, 4)]
    assert sorted(path.name for path in run.checkpoints.iterdir() if path.is_dir()) == aside
    with pytest.raises(UserError, match="none of its checkpoints is whole"):  # still, at the next start
        choose.to_resume_from(run, 1, aside=True)


def test_what_is_damaged_is_never_counted_among_those_kept(run: RunDirectory) -> None:
    save(run, 1, 2, 3)
    flip(storage.step_directory(run, 3) / "objective.safetensors")
    found = choose.to_resume_from(run, 1, aside=True)
    assert found is not None
    assert found.step == 2
    save(run, 3)
    storage.prune(run, 3, keep_last=2, keep_every=None)
    assert [path.name for path in storage.step_directories(run)] == ["step-2", "step-3"]
    assert len(list(run.checkpoints.glob("damaged-step-3--*"))) == 1


def test_only_what_is_older_than_a_published_checkpoint_is_pruned(run: RunDirectory) -> None:
    save(run, 1, 2, 3, 9)
    storage.prune(run, 3, keep_last=1, keep_every=None)
    assert [path.name for path in storage.step_directories(run)] == ["step-3", "step-9"]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"state": "running", "step": 7, "checkpoint_step": 4}, "step 4 was saved"),
        ({"state": "stopped", "step": 3}, "step 3 was saved"),
    ],
)
def test_the_runs_own_marks_forbid_a_beginning(run: RunDirectory, mark: dict, message: str) -> None:
    run.write_status(mark.pop("state"), 1, **mark)
    with pytest.raises(UserError, match=f"{message}.*--restart"):
        choose.to_resume_from(run, 2)


def test_only_a_run_without_a_save_begins_again(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    assert choose.to_resume_from(run, 5) is None
    run.metrics_file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(4)))
    run.write_status("failed", 1, step=3, checkpoint_step=0)
    assert choose.to_resume_from(run, 5) is None
    assert "the 3 steps in its metrics are trained again" in caplog.text
    with pytest.raises(UserError, match="3 steps are in its metrics"):  # at least one save should be there
        choose.to_resume_from(run, 1)


def test_a_mark_keeps_what_was_saved_when_the_supervisor_writes_it(run: RunDirectory) -> None:
    run.write_status("running", 1, step=8, checkpoint_step=6, total_steps=20)
    run.write_status("starting", 1, nodes="n1")
    assert run.read_status()["checkpoint_step"] == 6


def test_a_newer_format_is_named_not_called_damaged(run: RunDirectory) -> None:
    save(run, 1, 2)
    newest = storage.step_directory(run, 2)
    (newest / "state.json").write_text(json.dumps({"format": 2, "step": 2}))
    sums = json.loads((newest / "checksums.json").read_text())
    sums["state.json"] = checksum((newest / "state.json").read_bytes())
    (newest / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"step-2: is of checkpoint format 2, this program reads 1"):
        choose.newest(run, aside=True)
    assert newest.is_dir()


READER = """
import sys
from pathlib import Path
from mokd.checkpointing import choose, reading
from mokd.runs.run_directory import RunDirectory
reading.PAUSES_SECONDS = (0.01, 0.01)
try:
    print(choose.newest(RunDirectory(Path(sys.argv[1])), aside=True).step)
except reading.CheckpointUnreadableError as error:
    print("unreadable", error.errno)
"""


@pytest.fixture(scope="session")
def refusing_open(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes a process's opens fail, to be preloaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("library") / "refusing_open.so"
    source = ROOT / "tests" / "programs" / "refusing_open.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(("times", "expected"), [(2, "2"), (99, "unreadable")])
def test_unreadable_for_a_while_is_waited_for_and_never_called_damaged(
    run: RunDirectory, refusing_open: Path, number: int, times: int, expected: str
) -> None:
    save(run, 1, 2)
    environment = {"LD_PRELOAD": str(refusing_open), "REFUSE_PATH": "step-2/objective", "REFUSE_TIMES": str(times)}
    environment["REFUSE_ERRNO"] = str(number)
    read = subprocess.run(
        [sys.executable, "-c", READER, str(run.path)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert read.stdout.split()[0] == expected
    assert expected == "2" or read.stdout.split()[1] == str(number)
    assert [path.name for path in storage.step_directories(run)] == ["step-1", "step-2"]


def test_it_is_no_mistake_of_the_user(run: RunDirectory) -> None:
    save(run, 1)
    folder = storage.step_directory(run, 1)
    (folder / "objective.safetensors").unlink()
    (folder / "objective.safetensors").symlink_to("objective.safetensors")  # opening it is an error, not an absence
    with pytest.raises(CheckpointUnreadableError, match="again and again"):
        read_checkpoint(folder, pauses=())


def test_a_search_beside_the_start_answers_as_one_that_is_waited_for(run: RunDirectory) -> None:
    assert choose.begin_search(run, 5)() is None
    save(run, 1, 2)
    flip(storage.step_directory(run, 2) / "branch-a.safetensors")
    found = choose.begin_search(run, 5)()
    assert found is not None
    assert found.step == 1
    assert list(run.checkpoints.glob("damaged-step-2--*"))
    flip(storage.step_directory(run, 1) / "branch-a.safetensors")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        choose.begin_search(run, 5)()
