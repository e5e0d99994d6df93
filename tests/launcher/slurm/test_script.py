import subprocess
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig
from launcher.runs import code_snapshot
from launcher.runs.permissions import make_private, require_private
from launcher.runs.sweep import points, split_values
from launcher.slurm.sbatch_script import Script
from launcher.slurm.submit import runnable_path


def test_nothing_given_is_run_by_the_shell(tmp_path: Path) -> None:
    """A hostile name, folder and parameters: bash reads the script and runs none of it."""
    evil = f"x'; touch {tmp_path}/pwned; $(touch {tmp_path}/pwned) `touch {tmp_path}/pwned` \"y"
    folder = tmp_path / evil.replace("/", "|")
    cluster = ClusterConfig(
        partition=evil, account=evil, sbatch={"comment": evil, "exclusive": True}, environment={"EVIL": evil}
    )
    script = Script(cluster, evil, folder / "jobs", folder / "code", ["--launch", "1", str(folder)])
    text = script.text()
    # what sbatch and SLURM do is left out; everything else runs for real
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("squeue", "scontrol"):
        (stubs / name).write_text("#!/bin/sh\nexit 1\n")
        (stubs / name).chmod(0o755)
    ran = subprocess.run(
        ["bash", "-c", text.replace("exit $rc", 'printf "%s" "$EVIL"')],
        env={"PATH": f"{stubs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not (tmp_path / "pwned").exists()
    assert ran.stdout == evil
    assert all(line.startswith("#SBATCH --") for line in text.splitlines() if "comment" in line)


def test_the_script_says_what_was_asked() -> None:
    cluster = ClusterConfig(
        nodes=4, gpus_per_node=8, cpus_per_task=12, time="1-00:00:00", sbatch={"mem": 0, "x11": False}
    )
    text = Script(cluster, "mokd run", Path("/r/jobs"), Path("/r/code"), []).text()
    flags = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"nodes=4", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=12", "time=1440", "mem=0"} <= flags
    assert {"requeue", "signal=USR2@120", "open-mode=append"} <= flags
    assert not any(flag.startswith(("x11", "wckey")) for flag in flags)
    assert "--kill-on-bad-exit=1" in text


@pytest.mark.parametrize("name", ["a%j", "a\\b", "a\nb"])
def test_paths_that_slurm_would_change_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="must not hold"):
        runnable_path(Path("/runs") / name)


def test_directories_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(UserError, match="chmod go-w"):
        require_private(folder)


def test_snapshot_is_whole_and_replaced_at_once(tmp_path: Path) -> None:
    first = code_snapshot.take(tmp_path / "code")
    assert (tmp_path / "code" / "mokd" / "training" / "entry.py").is_file()
    assert (tmp_path / "code" / "launcher" / "slurm" / "rank_entry.py").is_file()
    assert not list((tmp_path / "code").rglob("*.pyc"))
    assert code_snapshot.take(tmp_path / "code") == first
    (tmp_path / "code" / "mokd" / "training" / "entry.py").write_text("changed")
    assert code_snapshot.digest(tmp_path / "code") != first
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_sweeps() -> None:
    found = points(["branches.0.weight=0.1,1.0", "views.global_crops.area_scale=[0.2, 1.0],[0.4, 1.0]"])
    assert [point.overrides[1] for point in found[:2]] == [
        "views.global_crops.area_scale=[0.2, 1.0]",
        "views.global_crops.area_scale=[0.4, 1.0]",
    ]
    assert len({point.suffix for point in found}) == 4
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    with pytest.raises(UserError, match="--sweep"):
        points(["seed"])
