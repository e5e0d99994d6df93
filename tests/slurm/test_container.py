"""Ranks in containers on real daemons, by the stand-ins for Apptainer and pyxis in `tests/programs`."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline.core.schema import dump_yaml
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.images import APPTAINER, PYTHON, make_image
from tests.slurm import harness
from tests.slurm.harness import finished, logs, pretend, push_out, wait_for_step, wait_until_final
from tests.support import mokd

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace of its own needs root"),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that holds Python with its packages, but neither this checkout nor any run or data."""
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{APPTAINER.parent}:{os.environ['PATH']}")


def test_trained_in_an_image(cluster: Cluster, beton: Path, image: Path, tmp_path: Path) -> None:
    """A launch from outside: the nodes are examined in the image, the ranks train there, from the snapshot."""
    small = tmp_path / "small.yaml"
    small.write_text(dump_yaml(harness.config(beton, "small", epochs=1)))
    chosen = [f"cluster.container.image={image}", f"cluster.container.python={PYTHON}"]
    arguments = ["launch", small, "--nodes", "2", "--time", "10", "--root", tmp_path / "runs", *chosen]
    checked = mokd(*arguments, "--check", "--json", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    reports = json.loads(checked.stdout)["nodes"]
    assert [report["node"] for report in reports] == ["n1", "n2"]
    assert all("slurm" not in {finding["check"] for finding in report["findings"]} for report in reports)
    launched = mokd(*arguments, "optim.max_steps=4", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(tmp_path / "runs" / "small")
    assert finished(run).step == 4, logs(run)


def test_signals_reach_the_ranks(cluster: Cluster, beton: Path, image: Path, tmp_path: Path) -> None:
    """A preemption: the ranks in the image save, the job is requeued and goes on where they stopped."""
    section = {"image": str(image), "python": PYTHON, "mounts": [str(harness.ROOT)]}
    run = pretend(tmp_path, beton, "preempted", {"steps": 400, "every": 1000}, container=section)
    wait_for_step(run, 20)
    push_out(cluster)
    status = finished(run)
    assert [restart["reason"] for restart in status.restarts] != [], logs(run)
    assert status.restarts[0]["step"] >= 20, "saved when asked, for nothing else saves"
    where = json.loads((run.path / "where.json").read_text())
    assert where.startswith(str(run.path / "code"))


def test_launched_from_inside(cluster: Cluster, beton: Path, image: Path, tmp_path: Path) -> None:
    """MOKD in the image alone, with the host's SLURM bound: its supervisor and ranks run in that image."""
    root, config = tmp_path / "runs", tmp_path / "small.yaml"
    root.mkdir()
    config.write_text(dump_yaml(harness.config(beton, "inside", epochs=1)))
    binds = [cluster.state, harness.ROOT, beton.parent, tmp_path]
    inside = [str(APPTAINER), "exec", *(word for bind in binds for word in ("--bind", str(bind))), str(image), PYTHON]
    given = ["launch", str(config), "--nodes", "2", "--time", "10", "--root", str(root), "optim.max_steps=4"]
    given += [f"cluster.setup=[export PATH={APPTAINER.parent}:$PATH]"]  # a job inherits the image's path
    launched = subprocess.run(
        [*inside, "-m", "launcher.cli", *given], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert launched.returncode == 0, launched.stderr
    run = RunDirectory(root / "inside")
    assert finished(run).step == 4, logs(run)
    script = next(run.jobs.glob("*_submission.sh")).read_text()
    assert f"{image} env -u PYTHONHOME PYTHONPATH={run.path}/code" in script.partition("launcher.slurm.supervisor")[0]


def test_pyxis(cluster: Cluster, beton: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which("srun")
    assert real is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").symlink_to(APPTAINER.with_name("srun_with_pyxis"))
    monkeypatch.setenv("MOKD_TEST_SRUN", real)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    section = {"image": str(image), "python": PYTHON, "mounts": [str(harness.ROOT)], "runtime": "pyxis"}
    run = pretend(tmp_path, beton, "pyxis", {"steps": 5}, container=section)
    assert finished(run).step == 5


def test_a_node_without_the_runtime(
    cluster: Cluster, beton: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after a few tries and says what was missing."""
    section = {"image": str(image), "runtime": "singularity", "mounts": [str(harness.ROOT)]}
    run = pretend(tmp_path, beton, "without", {"steps": 5}, container=section, max_restarts_without_progress=1)
    assert wait_until_final(run).state == "failed"
    assert "singularity" in logs(run)
