"""Each planted fault is real (a missing program, a lowered limit, a tiny file system) and is found by its check."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.doctor import gpus, node, scheduler, software
from launcher.doctor.examination import examine
from launcher.doctor.finding import Finding, Surroundings
from tests.support import ROOT


def here(**changes: str) -> dict[str, str]:
    """This process's environment, with changes."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def test_no_compiler(tmp_path: Path) -> None:
    found = software.compiler(Surroundings(environ={"PATH": str(tmp_path), "MOKD_GPUS_PER_NODE": "1"}))
    assert found.level == "problem"
    assert "no C compiler" in found.message


def test_a_compiler_that_fails() -> None:
    found = software.compiler(Surroundings(environ=here(CC="false", MOKD_GPUS_PER_NODE="1")))
    assert found.level == "problem"
    assert "cannot build" in found.message


def test_ffcv_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "ffcv.py").write_text("raise ImportError('libturbojpeg.so.0: cannot open shared object file')\n")
    found = software.ffcv(Surroundings(environ=here(PYTHONPATH=str(tmp_path))))
    assert found.level == "problem"
    assert "libturbojpeg" in found.message
    assert software.ffcv(Surroundings(environ=here(PYTHONPATH=str(tmp_path)), backend="torchvision")).level == "warning"


def test_native_library_missing(tmp_path: Path) -> None:
    found = software.native_libraries(Surroundings(packages=(tmp_path,)))
    assert (found.level, found.mend) == ("problem", "make setup")
    assert software.native_libraries(Surroundings()).level == "ok"


def test_gpus_promised_and_hidden() -> None:
    found = gpus.gpus(Surroundings(environ=here(CUDA_VISIBLE_DEVICES="", MOKD_GPUS_PER_NODE="4")))
    assert found.level == "problem"
    assert "4 promised, none usable" in found.message
    # a build of torch without CUDA is named before everything else
    assert "CUDA_VISIBLE_DEVICES is empty" in found.message or "built without CUDA" in found.message


def test_interface_that_is_not_there() -> None:
    found = gpus.network(Surroundings(environ=here(NCCL_SOCKET_IFNAME="ib77")))
    assert found.level == "problem"
    assert "ib77" in found.message


@pytest.mark.parametrize(("hard", "mend"), [(256, "LimitNOFILE"), (1024, "ulimit -n 1024")])
def test_open_files_lowered(hard: int, mend: str) -> None:
    program = (
        "from launcher.doctor import node; from launcher.doctor.finding import Surroundings; "
        "f = node.open_files(Surroundings()); print(f.level, f.message, f.mend)"
    )

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    done = subprocess.run(
        [sys.executable, "-c", program], preexec_fn=lower, env=here(), capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("problem at most 256 at once ")
    assert mend in done.stdout


def test_small_shared_memory(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        found = node.shared_memory(Surroundings(shm=tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert found.level == "problem"
    assert "64 MiB" in found.message


def test_run_directory_that_cannot_be_written() -> None:
    found = node.run_directory(Surroundings(runs=Path("/proc/1")))  # read-only even for root
    assert found.level == "problem"
    assert "cannot be written" in found.message


def test_data_that_is_not_there(tmp_path: Path) -> None:
    assert node.data(Surroundings(data=(tmp_path / "train.beton",))).level == "problem"


def test_stopped_controller_and_munge(tmp_path: Path) -> None:
    """A cluster is configured, but neither its controller nor its munge runs."""
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        f"ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/munge\n"
        f"AuthInfo=socket={tmp_path}/socket\nNodeName=n1\nPartitionName=p Nodes=n1\n"
    )
    if subprocess.run(["which", "munge", "scontrol"], capture_output=True, check=False).returncode:
        pytest.skip("needs SLURM's commands")
    around = Surroundings(environ=here(SLURM_CONF=str(conf)))
    assert "does not answer" in scheduler.slurm(around).message
    assert scheduler.munge(around).level == "problem"


def test_a_check_that_breaks_is_a_problem_and_the_others_are_asked() -> None:
    def broken(here: Surroundings) -> Finding:
        raise RuntimeError("oh")

    checks: tuple[Callable[[Surroundings], Finding], ...] = (broken, software.python)
    report = examine(Surroundings(), checks)
    assert [finding.level for finding in report.findings.values()] == ["problem", "ok"]
    assert not report.healthy
