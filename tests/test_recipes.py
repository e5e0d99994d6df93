"""The recipes of images and of a conda environment have what the project needs, and agree with each other."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.support import ROOT

CONTAINERS = ROOT / "tools" / "containers"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def copied() -> tuple[set[str], set[str]]:
    """What the two recipes take from the checkout."""
    docker = (CONTAINERS / "Dockerfile").read_text()
    words = [line.split()[1:-1] for line in docker.splitlines() if line.startswith("COPY ")]
    files = re.search(r"^%files\n(.*?)\n\n", (CONTAINERS / "mokd.def").read_text(), re.MULTILINE | re.DOTALL)
    assert files is not None
    return {word for line in words for word in line}, {line.split()[0] for line in files[1].splitlines()}


def test_both_images_have_the_same_sources() -> None:
    docker, apptainer = copied()
    assert docker == apptainer
    assert {"pyproject.toml", "setup.py", "configs", "data_pipeline", "mokd", "launcher"} <= docker
    assert all((ROOT / path).exists() for path in docker)


def test_both_images_have_the_same_extras_and_path() -> None:
    docker, apptainer = ((CONTAINERS / name).read_text() for name in ("Dockerfile", "mokd.def"))
    for pattern in (r"EXTRAS=([\w,]+)", r"PATH=(\S+)"):
        assert re.findall(pattern, docker)[0] == re.findall(pattern, apptainer)[0]
    assert {*re.findall(r"EXTRAS=([\w,]+)", docker)[0].split(",")} <= PROJECT["optional-dependencies"].keys()


def test_the_conda_environment() -> None:
    environment = yaml.safe_load((ROOT / "tools" / "environment.yaml").read_text())
    *packages, pip = environment["dependencies"]
    assert {"cxx-compiler", "libjpeg-turbo", "pip"} <= {*packages}
    assert "python=3.12" in packages
    constraints, project = pip["pip"]
    assert constraints == "-c ../constraints.txt"
    # pip reads the lines in the folder of the file
    extras = re.fullmatch(r"-e \.\.\[([\w,]+)\]", project)
    assert extras is not None
    assert {*extras[1].split(",")} <= PROJECT["optional-dependencies"].keys()
