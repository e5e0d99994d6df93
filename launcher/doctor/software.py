"""Python, torch, Triton's compiler, FFCV and our native libraries."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from data_pipeline.core.native_library import built
from launcher.doctor.finding import Finding, Level, Surroundings, last_line

TORCH = (2, 11)
PACKAGES = ("data_pipeline", "mokd")


def python(here: Surroundings) -> Finding:
    """The interpreter is one that the project runs on."""
    version = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < (3, 11):  # noqa: UP036 - the doctor may be started by hand with any
        return Finding("problem", f"{version}: 3.11 or newer is needed", "make setup PYTHON=python3.12")
    return Finding("ok", version)


def torch(here: Surroundings) -> Finding:
    """PyTorch can be imported and is new enough."""
    done = here.python("import torch; print(torch.__version__, torch.version.cuda)")
    if done.returncode:
        return Finding("problem", f"cannot be imported: {last_line(done.stderr)}", "make setup")
    version, cuda = done.stdout.split()
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TORCH:
        return Finding("problem", f"{version}: {TORCH[0]}.{TORCH[1]} or newer is needed", "make setup")
    if cuda == "None" and here.wants_gpus:
        mend = "pip install torch torchvision  # a build with CUDA, see https://pytorch.org"
        return Finding("problem", f"{version} is built without CUDA", mend)
    return Finding("ok", f"{version}, CUDA {cuda}")


def compiler(here: Surroundings) -> Finding:
    """Triton builds a small driver with the C compiler and Python.h when its first kernel starts."""
    level: Level = "problem" if here.wants_gpus else "warning"
    candidates = [here.environ["CC"].split()[0]] if here.environ.get("CC") else ["gcc", "clang", "cc"]
    found = [path for name in candidates if (path := shutil.which(name, path=here.environ.get("PATH", "")))]
    if not found:
        message = f"no C compiler ({', '.join(candidates)}) on PATH: Triton's kernels cannot start"
        return Finding(level, message, "apt-get install gcc, or in cluster.setup: module load gcc")
    include = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <Python.h>\nint probe(void) { return PY_MAJOR_VERSION; }\n")
        done = here.run(found[0], "-shared", "-fPIC", f"-I{include}", str(source), "-o", f"{folder}/probe.so")
    if done.returncode:
        text = "Python.h is missing" if "Python.h" in done.stderr else last_line(done.stderr)
        mend = f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return Finding(level, f"{found[0]} cannot build a Python extension: {text}", mend)
    return Finding("ok", f"{found[0]}, {include}/Python.h")


def ffcv(here: Surroundings) -> Finding:
    """FFCV and the libraries under it load."""
    done = here.python("import ffcv, ffcv.libffcv; from importlib.metadata import version; print(version('ffcv'))")
    if done.returncode == 0:
        return Finding("ok", done.stdout.strip())
    level: Level = "problem" if here.backend == "ffcv" else "warning"
    mend = "apt-get install libturbojpeg0-dev libopencv-dev && make setup; or set data.backend=torchvision"
    return Finding(level, f"cannot be imported: {last_line(done.stderr)}", mend)


def native_libraries(here: Surroundings) -> Finding:
    """The two compiled parts of the project were built and load."""
    folders = here.packages
    if folders is None:
        specs = [find_spec(name) for name in PACKAGES]
        folders = tuple(Path(str(spec.origin)).parent for spec in specs if spec is not None)
    for folder in folders:
        path = built(folder)
        if path is None:
            return Finding("problem", f"{folder}: the compiled part was not built", "make setup")
        # torch first, as wherever it is used: it brings the OpenMP library
        done = here.python(f"import torch, ctypes; ctypes.CDLL({str(path)!r})")
        if done.returncode:
            return Finding("problem", f"{path}: cannot be loaded: {last_line(done.stderr)}", "make setup")
    return Finding("ok", ", ".join(folder.name for folder in folders))


def affinity(here: Surroundings) -> Finding:
    """The cores that this process may use are those that the job was given."""
    mine, all_ = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = f"{mine} of {all_} cores"
    given = here.environ.get("SLURM_CPUS_ON_NODE", "")
    tasks = here.environ.get("MOKD_RANKS_PER_NODE", "")
    if tasks.isdigit() and mine < int(tasks):
        message = f"{text} for {tasks} ranks on this node"
        return Finding("warning", message, "mokd launch ... --cpus-per-task N, or srun: [--cpu-bind=cores]")
    if given.isdigit() and mine < int(given):
        return Finding("warning", f"{text}, though SLURM gave this job {given}", "cluster.srun: [--cpu-bind=cores]")
    return Finding("ok", text)
