"""Ranks in a container: what stands in the batch script, what is refused before, and that the line works."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core import schema
from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig
from launcher.runs import code_snapshot
from launcher.slurm import container
from launcher.slurm.sbatch_script import Script
from tests.images import APPTAINER, PYTHON, make_image
from tests.support import ROOT, mokd, tiny_config

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace of its own needs root")
inside_image = {"APPTAINER_CONTAINER": "/images/mokd.sif", "APPTAINER_BIND": "/usr/bin/sbatch,/scratch"}


def cluster(**section: Any) -> ClusterConfig:
    return schema.validate(ClusterConfig, {"container": section}, "test")


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"image": ""}, "not empty"),
        ({"image": "--writable"}, "without a dash"),
        ({"image": "a.sif", "mounts": ["data:/data"]}, "absolute"),
        ({"image": "a.sif", "mounts": ["/a,/b"]}, "without a comma"),
        ({"image": "a.sif", "options": ["--cleanenv"]}, "find each other"),
        ({"image": "a.sif", "runtime": "docker"}, "expected 'apptainer', 'singularity' or 'pyxis'"),
        ({"imag": "a.sif"}, "did you mean 'image'"),
        ({"runtime": "pyxis"}, "container.image"),
    ],
)
def test_the_section_is_strict(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        cluster(**section)
    assert "\n" not in str(caught.value)


def test_the_image_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mokd.sif").touch()
    found = container.settle(cluster(image="mokd.sif"), local=False).container
    assert found is not None
    assert found.image == str(tmp_path / "mokd.sif")
    named = cluster(image="team#mokd:1.0", runtime="pyxis")
    assert container.settle(named, local=False) == named
    for section, message in (
        ({"image": "none.sif"}, f"{tmp_path}/none.sif: no such image"),
        ({"image": "none.sqsh", "runtime": "pyxis"}, f"{tmp_path}/none.sqsh: no such image"),
        ({"image": "docker://mokd"}, "once: apptainer pull mokd.sif docker://mokd"),
    ):
        with pytest.raises(UserError, match=message):
            container.settle(cluster(**section), local=False)
    with pytest.raises(UserError, match="--local"):
        container.settle(cluster(image="mokd.sif"), local=True)


def test_inside_of_a_container_its_image_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in inside_image.items():
        monkeypatch.setenv(name, value)
    found = container.settle(ClusterConfig(), local=False)
    assert found.container is not None
    assert (found.container.image, found.container.runtime) == ("/images/mokd.sif", "apptainer")
    assert container.settle(found, local=True).container is None, "a local job is where it should be already"
    text = Script(found, "run", Path("/r/jobs"), Path("/r/code"), [], [Path("/r")]).text()
    line = next(line for line in text.splitlines() if "launcher.slurm.supervisor" in line)
    supervisor, ranks = line.split(" -- ")
    for part in (supervisor, ranks):
        assert "apptainer exec --bind /usr/bin/sbatch --bind /scratch --bind /r:/r /images/mokd.sif env" in part


def test_pyxis_is_asked_for_as_srun_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = cluster(image="/i/mokd.sqsh", runtime="pyxis", mounts=["/scratch"], options=["--container-writable"])
    line = Script(chosen, "run", Path("/r/jobs"), Path("/r/code"), [], [Path("/r"), Path("/d")]).text()
    assert (
        "--container-image=/i/mokd.sqsh --container-mounts=/r:/r,/d:/d,/scratch --container-writable env -u PYTHONHOME "
        "PYTHONPATH=/r/code PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 python3 -u -m submitit.core._submit /r/jobs"
    ) in line
    for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho --container-imag\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="no --container-image"):
        container.check(chosen, [])
    (tmp_path / "srun").write_text("#!/bin/sh\necho --container-image=IMAGE\n")
    assert container.check(chosen, []) == []


def test_gpus_are_let_in() -> None:
    def words(gpus: int, *options: str) -> str:
        chosen = cluster(image="/i.sif", options=options).model_copy(update={"gpus_per_node": gpus})
        return " ".join(container.rank_words(chosen, [], Path("/c")).python)

    assert " --nv /i.sif" in words(4)
    assert "--nv" not in words(0)
    assert "--nv" not in words(4, "--rocm")


def test_what_a_run_reads_is_bound(tmp_path: Path) -> None:
    """The folders of its betons, for the manifest beside each, those that links lead to, and none twice."""
    data, elsewhere, run = tmp_path / "data", tmp_path / "elsewhere", tmp_path / "runs" / "tiny"
    for folder in (data / "deep", elsewhere):
        folder.mkdir(parents=True)
    (data / "train.beton").symlink_to(elsewhere / "train.beton")
    config = tiny_config(
        data / "train.beton", evaluation={"train": str(data / "deep" / "a.beton"), "test": str(data / "b.beton")}
    )
    assert {*container.run_paths(config, run)} == {run, data, elsewhere}
    with pytest.raises(UserError, match="cannot be bound"):
        container.check(cluster(image="/i.sif"), [Path("/runs/a:b")])


@needs_root
def test_the_line_works(tmp_path: Path) -> None:
    """Python of the image, with the snapshot, the run and the data, the variables of the job, and nothing else."""
    image, run = make_image(tmp_path / "image"), tmp_path / "runs" / "it's $(here)"
    run.mkdir(parents=True)
    (tmp_path / "unbound").mkdir()
    chosen = cluster(image=str(image), python=PYTHON).model_copy(update={"environment": {"GIVEN": "a  'b'"}})
    program = (
        "import json, os, sys; open(os.path.join(sys.argv[1], 'written'), 'w').write('x'); print(json.dumps(["
        "os.path.exists(sys.argv[2]), os.environ['PYTHONPATH'], os.environ['GIVEN'], os.environ['MASTER_ADDR'],"
        "os.environ.get('PYTHONHOME'), os.environ['APPTAINER_CONTAINER']]))"
    )
    words = container.rank_words(chosen, [run], run / "code")
    assert words.srun == ()
    done = subprocess.run(
        [*words.python, "-c", program, str(run), str(tmp_path / "unbound")],
        env={"PATH": f"{APPTAINER.parent}:{os.environ['PATH']}", "MASTER_ADDR": "n1", "PYTHONHOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, f"{run}/code", "a  'b'", "n1", None, str(image)]
    assert (run / "written").read_text() == "x"


def test_launch_refuses_and_shows(beton: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(schema.dump_yaml(tiny_config(beton)))
    (tmp_path / "mokd.sif").touch()
    given = [
        "launch",
        config,
        "--root",
        tmp_path / "runs",
        "--dry-run",
        "cluster.gpus_per_node=0",
        "parallel.device=cpu",
    ]
    bare = {"cwd": tmp_path, "PATH": "/nonexistent"}  # SLURM is not asked
    refused = mokd(*given, "cluster.container.image=none.sif", **bare)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].endswith("docs/containers.md tells how to make one")
    shown = mokd(*given, "cluster.container.image=mokd.sif", "cluster.cpus_per_task=1", **bare)
    assert shown.returncode == 0, shown.stderr
    assert f"in {tmp_path}/mokd.sif (apptainer)" in shown.stderr
    for path in (tmp_path / "runs" / "tiny", beton.parent):
        assert f" --bind {path}:{path} " in shown.stdout
    assert f" {tmp_path}/mokd.sif env " in shown.stdout


def test_the_snapshot_has_what_a_wheel_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an installed wheel, whose compiled part needs the libraries in `mokd.libs` beside the packages."""
    site = tmp_path / "site-packages"
    (site / "mokd.libs").mkdir(parents=True)
    (site / "mokd.libs" / "libturbojpeg.so").touch()
    for package in code_snapshot.PACKAGES:
        (site / package.__name__).mkdir()
        (site / package.__name__ / "__init__.py").touch()
        monkeypatch.setattr(package, "__file__", str(site / package.__name__ / "__init__.py"))
    code_snapshot.take(tmp_path / "code")
    assert (tmp_path / "code" / "mokd.libs" / "libturbojpeg.so").exists()


def test_the_compiled_part_of_another_python_is_found(tmp_path: Path) -> None:
    from data_pipeline.core.native_library import built

    (tmp_path / "_native.cpython-399-x86_64-linux-gnu.so").touch()
    found = built(tmp_path)
    assert found is not None
    assert found.name == "_native.cpython-399-x86_64-linux-gnu.so"
    assert ROOT not in found.parents
