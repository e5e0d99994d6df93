"""What the tests on real daemons share: clusters, runs, waiting, injecting."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core import schema
from launcher.config import ClusterConfig
from launcher.runs.logs import log_files
from launcher.runs.records import Records, checkpoint_step
from launcher.slurm.status import FINAL, RunStatus, read_status
from launcher.slurm.submit import create_run, submit, submit_array
from mokd.config import RunConfig
from mokd.runs.files import read_json
from mokd.runs.processes import process_start
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from slurm.config import Options

ROOT = Path(__file__).resolve().parents[2]
PAYLOAD = "tests.launcher.payload:run"
IMAGES, BATCH = 64, 8
Record = Callable[[str, Any], None]
Start = Callable[..., Cluster]


STATES = f"mokd-slurm-{os.getuid()}-"


def open_cluster() -> Cluster:
    """A cluster for this test session alone; what sessions that were killed have left is taken down."""
    for left in Path(tempfile.gettempdir()).glob(f"{STATES}*"):
        if process_start(int(left.name.removeprefix(STATES))) is None:
            Cluster(left).down()
            shutil.rmtree(left)
    return Cluster(Path(tempfile.gettempdir()) / f"{STATES}{os.getpid()}")


def options(**changes: Any) -> Options:
    """The tests' cluster: like `make slurm-up`'s, on ports of its own and with less patience."""
    port = 18000 + 10 * (os.getpid() % 400)
    return Options(**{"port": port, "kill_wait_seconds": 20, **changes})


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one that is given the same id."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this id now."""
        return cls(pid, process_start(pid) or "gone")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return process_start(self.pid) == self.started

    def signal(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals it, and nobody else."""
        if self.alive:
            os.kill(self.pid, number)


def make_images(folder: Path) -> Path:
    """A small beton of generated pictures, and `test.beton` beside it."""
    from data_pipeline.beton.convert import ConvertOptions, convert
    from data_pipeline.beton.synthetic import generate

    generate(folder / "images", classes=4, per_class_train=IMAGES // 4, per_class_test=4, size_px=40)
    for name in ("train", "test"):
        convert([folder / "images" / name], folder / f"{name}.beton", ConvertOptions(workers=1))
    return folder / "train.beton"


def config(beton: Path, name: str, *, epochs: int = 3, every: int = 4, **changes: Any) -> RunConfig:
    """A pair small enough for a step to take a few hundredths of a second; 8 steps and an evaluation an epoch."""
    optimizer = {"kind": "adamw", "lr": 1e-3, "min_lr": 1e-5, "weight_decay": 0.04}
    head = {"hidden": 32, "bottleneck": 16}
    raw: dict[str, Any] = {
        "name": name,
        "objective": {"kind": "dino", "prototypes": 32, "t_head": {"width": 24, "depth": 1, "heads": 2}},
        "data": {"train": str(beton), "workers": 1},
        "views": {
            "global_crops": {"count": 2, "size_px": 32, "area_scale": [0.4, 1.0], "blur_probability": [0.5]},
            "local_crops": {"count": 2, "size_px": 16, "area_scale": [0.1, 0.4], "blur_probability": [0.2]},
        },
        "branches": [
            {"name": "cnn", "backbone": "test_resnet", "mlp_head": head, "optimizer": optimizer},
            {
                "name": "vit",
                "backbone": "test_vit",
                "backbone_options": {"patch_size": 8},
                "mlp_head": head,
                "optimizer": optimizer,
            },
        ],
        "optim": {"epochs": epochs, "global_batch": BATCH, "warmup_epochs": 1},
        "parallel": {"device": "cpu", "threads_per_rank": 1, "timeout_seconds": 60.0},
        "checkpoint": {"every_steps": every},
        "evaluation": {
            "train": str(beton),
            "test": str(beton.with_name("test.beton")),
            "every_epochs": 1,
            "resize_px": 36,
            "crop_px": 32,
        },
        "logging": {"every_steps": 1},
    }
    return schema.validate(
        RunConfig, schema.apply_overrides(raw, [f"{k}={json.dumps(v)}" for k, v in changes.items()]), name
    )


def cluster_config(**changes: Any) -> ClusterConfig:
    """Two nodes, one rank each, unless told otherwise."""
    base = {"nodes": 2, "time": "10", "signal_lead_seconds": 30, "environment": {"PYTHONPATH": str(ROOT)}}
    return schema.validate(ClusterConfig, {**base, **changes}, "test")


def train(configuration: RunConfig, root: Path, **cluster: Any) -> RunDirectory:
    """Submits the real trainer."""
    run = create_run(configuration, root)
    submit(run, cluster_config(**cluster))
    return run


def pretend(root: Path, beton: Path, name: str, plan: dict[str, Any], **cluster: Any) -> RunDirectory:
    """Submits the payload, which behaves like the trainer and costs nothing."""
    run = create_run(config(beton, name), root)
    (run.path / "payload.json").write_text(json.dumps(plan))
    submit(run, cluster_config(**cluster), entry=PAYLOAD)
    return run


def sweep(
    configurations: list[RunConfig], root: Path, plan: dict[str, Any] | None = None, **cluster: Any
) -> list[RunDirectory]:
    """Submits a job array: of the real trainer, or, with a `plan`, of the payload."""
    runs = [create_run(configuration, root) for configuration in configurations]
    if plan is not None:
        for run in runs:
            (run.path / "payload.json").write_text(json.dumps(plan))
    entry = {} if plan is None else {"entry": PAYLOAD}
    submit_array(runs, root / "sweep", cluster_config(**cluster), "sweep", **entry)
    return runs


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 150.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def wait_until_final(run: RunDirectory, seconds: float = 400.0) -> RunStatus:
    """The run's status once it will not change by itself any more."""
    status: RunStatus = wait_for("the run's end", lambda: (s := read_status(run)).state in FINAL and s, seconds)
    return status


def finished(run: RunDirectory, seconds: float = 400.0) -> RunStatus:
    """The status of a run that has to end well."""
    status = wait_until_final(run, seconds)
    assert status.state == "done", logs(run)
    return status


def check_lost(run: RunDirectory, most: int, record_property: Record) -> None:
    """Measures the steps that a restart has cost at most, for the table, and bounds them."""
    lost = max(lost_steps(run), default=0)
    record_property("lost", lost)
    assert lost <= most


def check_same(run: RunDirectory, undisturbed: RunDirectory, most_lost: int, record_property: Record) -> None:
    """A disturbed run ends with the bits, the curves and the evaluations of one that nothing happened to."""
    record_property("restarts", len(finished(run).restarts))
    check_lost(run, most_lost, record_property)
    assert logged_steps(run) == logged_steps(undisturbed) == list(range(1, checkpoint_step(run) + 1))
    assert board_steps(run) == board_steps(undisturbed)
    assert evaluations(run) == evaluations(undisturbed) != {}
    assert weights(run) == weights(undisturbed)


def wait_for_step(run: RunDirectory, step: int, attempt: int = 1, seconds: float = 200.0) -> int:
    """Waits until an attempt has done `step` steps."""

    def reached() -> int:
        mark = run.read_status()
        running = mark.get("state") == "running" and mark.get("attempt", 0) >= attempt
        return int(mark.get("step", 0)) if running and mark.get("step", 0) >= step else 0

    return int(wait_for(f"step {step} of attempt {attempt}", reached, seconds))


def job_of(run: RunDirectory) -> str:
    """The id of the run's job."""
    launch = Records(run).last_launch()
    assert launch is not None
    assert launch.job_id
    return launch.job_id


def ranks(run: RunDirectory) -> dict[int, Process]:
    """The run's living ranks."""
    found, launch = {}, Records(run).last_launch()
    assert launch is not None
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(v.partition(b"=")[::2] for v in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        mine = b"submitit.core._submit" in command and launch.folder.encode() in command
        if array := environment.get(b"SLURM_ARRAY_JOB_ID"):
            # the runs of a sweep share their folder
            mine = mine and f"{array.decode()}_{environment[b'SLURM_ARRAY_TASK_ID'].decode()}" == launch.job_id
        if (
            mine
            and b"srun" not in command
            and b"SLURM_PROCID" in environment
            and b"launcher.slurm.supervisor" not in command
        ):
            found[int(environment[b"SLURM_PROCID"])] = Process.of(int(entry.name))
    return found


def both_ranks(run: RunDirectory) -> dict[int, Process]:
    """The two living ranks of a run; waited for, as those of the stand-in do not start together."""
    return dict(wait_for("both ranks", lambda: found if len(found := ranks(run)) == 2 else None, 30.0))


def weights(run: RunDirectory) -> str:
    """A hash of everything trained, in the newest checkpoint."""
    folder = run.checkpoints / f"step-{checkpoint_step(run)}"
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def logged_steps(run: RunDirectory) -> list[int]:
    """The training steps in metrics.jsonl, as they stand there."""
    return [record["step"] for record in _records(run) if "images_seen" in record]


def evaluations(run: RunDirectory) -> dict[int, dict[str, float]]:
    """What every evaluation while training found, by step; each may have been done once only."""
    found: dict[int, dict[str, float]] = {}
    for record in _records(run):
        accuracies = {key: value for key, value in record.items() if key.startswith("eval/")}
        assert not accuracies.keys() & found.get(record["step"], {}).keys(), record
        if accuracies:
            found.setdefault(record["step"], {}).update(accuracies)
    return found


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def losses_by_step(run: RunDirectory) -> dict[tuple[int, str], float]:
    """Every branch's total loss at every step."""
    return {
        (record["step"], key): value
        for record in _records(run)
        for key, value in record.items()
        if key.startswith("loss/") and key.endswith("/total")
    }


def board_steps(run: RunDirectory) -> list[int]:
    """The steps that TensorBoard shows for a loss, each as often as it shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("loss/cnn/total")]


def relative_distance(one: RunDirectory, other: RunDirectory) -> float:
    """How far the students and teachers of two runs are apart, relative to their size, at the same step."""
    from safetensors.torch import load_file

    difference = size = 0.0
    for path in (one.checkpoints / f"step-{checkpoint_step(one)}").glob("branch-*.safetensors"):
        mine, theirs = load_file(path), load_file(other.checkpoints / path.parent.name / path.name)
        for name in mine:
            if name.startswith(("student", "teacher")):
                difference += float((mine[name].double() - theirs[name].double()).pow(2).sum())
                size += float(mine[name].double().pow(2).sum())
    return float((difference / size) ** 0.5)


def push_out(cluster: Cluster, node: str | None = None) -> None:
    """A job of the higher partition that needs a node, or every one, for a moment."""
    where = ["-w", node] if node else ["-N", str(len(cluster.nodes()))]
    cluster.run("sbatch", "-p", "high", *where, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")


def kill(processes: Iterable[Process], number: signal.Signals = signal.SIGKILL) -> None:
    """Signals processes that may be gone already."""
    for process in processes:
        process.signal(number)


def logs(run: RunDirectory) -> str:
    """Everything that the job has written, for a failing test's report."""
    folders = {Path(launch.folder) for launch in Records(run).launches()}
    found = [path for folder in folders for path in sorted(folder.glob("*_log.*"))]
    return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}\n" for path in found)


def attempt_record(run: RunDirectory, attempt: int) -> dict[str, Any]:
    """What an attempt registered when it started."""
    return read_json(run.path / "attempts" / f"{attempt:04d}.json") or {}


def lost_steps(run: RunDirectory) -> list[int]:
    """Steps done twice after each restart: the last step an attempt showed, less the step its successor began with."""
    text = "".join(path.read_text() for path in log_files(run, 0) if path.suffix == ".err")
    attempts = re.split(r"^=== attempt \d+.*$", text, flags=re.MULTILINE)[1:]
    reached, lost = 0, []
    for index, part in enumerate(attempts):
        resumed = re.search(r"resumed at step (\d+)", part)
        shown = [int(step) for step in re.findall(r"^step (\d+)/", part, flags=re.MULTILINE)]
        if not shown and not resumed:
            continue  # ended before it began to train
        if index:
            lost.append(max(0, reached - (int(resumed[1]) if resumed else 0)))
        reached = max(reached, *shown, 0)
    return lost


def children(cluster: Cluster, node: str) -> list[Process]:
    """The slurmstepd of a node's steps: they write to its log, and outlive its slurmd."""
    found, log = [], cluster.state / "log" / f"slurmd-{node}.log"
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"slurmstepd") and any(
                file.readlink() == log for file in (entry / "fd").iterdir()
            ):
                found.append(Process.of(int(entry.name)))
        except OSError:  # gone meanwhile
            continue
    return found


def controller_has_saved(cluster: Cluster, run: RunDirectory) -> None:
    """Waits until the controller knows the run's job after a `kill -9`: what it has not written down is unheard of."""
    started = float(attempt_record(run, 1)["time"])
    saved_state = cluster.state / "ctld" / "job_state"
    wait_for("the controller to save its state", lambda: saved_state.stat().st_mtime > started + 2.0, 60.0)
