"""One run on four SLURM nodes under random faults, then compared with the same run undisturbed.

    python -m tests.faults.soak --minutes 60 --seed 0 [--record FILE]

Every 30 to 120 seconds something goes wrong, whatever the run is doing then. In the end the run is cancelled, which
saves it, and the real trainer trains as many steps undisturbed: weights, optimisers, curves and evaluations must be the
same. The clock is not made to jump: it is this machine's only one, and durations are measured with the monotonic clock.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import machine
from data_pipeline.core.errors import UserError
from launcher.runs.goodput import goodput
from launcher.runs.records import Records, checkpoint_step
from launcher.slurm.status import read_status
from launcher.slurm.submit import cancel, create_run, submit
from mokd.distributed.local_ranks import train_locally
from mokd.runs.run_directory import RunDirectory
from slurm.cluster import Cluster
from tests.slurm import harness

NODES, EVERY = 4, 10
PAUSE_SECONDS = 0.5
DISK_BYTES = 64 << 20


class Faults:
    """The repertoire; every method does its harm, waits until it has happened, and takes it back if need be."""

    def __init__(self, cluster: Cluster, run: RunDirectory, disk: Path, eio: Path, dice: random.Random) -> None:
        self.cluster, self.run, self.disk, self.eio, self.dice = cluster, run, disk, eio, dice

    def all(self) -> dict[str, Callable[[], None]]:
        """The faults by their names."""
        found: dict[str, Callable[[], None]] = {
            "rank killed": lambda: self._rank().signal(signal.SIGKILL),
            "rank stopped": lambda: self._rank().signal(signal.SIGSTOP),
            "requeue": lambda: self._quietly("scontrol", "requeue", harness.job_of(self.run)),
            "signal": lambda: self._quietly("scancel", "--full", "--signal=USR2", harness.job_of(self.run)),
            "preemption": lambda: harness.push_out(self.cluster),
            "node death": self._node_death,
            "checkpoints unreadable": self._unreadable,
        }
        return found | ({"disk full": self._disk_full} if os.path.ismount(self.disk) else {})

    def _rank(self) -> harness.Process:
        found = harness.wait_for("living ranks", lambda: harness.ranks(self.run), 300.0)
        return self.dice.choice(sorted(found.values(), key=lambda process: process.pid))

    def _quietly(self, *command: str) -> None:
        self.cluster.ask(*command)  # a job that is queued cannot be requeued, nor signalled

    def _node_death(self) -> None:
        node = self.dice.choice(self.cluster.nodes())
        processes = harness.children(self.cluster, node)
        ranks = harness.ranks(self.run)
        self.cluster.stop(node, signal.SIGKILL)
        # every node has one rank, in their order
        harness.kill([*processes, *(rank for number, rank in ranks.items() if node == f"n{number + 1}")])
        with suppress(AssertionError):  # nobody misses a node that had no job
            down = lambda: node in self.cluster.ask("sinfo", "-hN", "-t", "down", "-o", "%N").split()  # noqa: E731
            harness.wait_for("SLURM to miss the node", down, 60.0)
        self.cluster.wipe_spool(node)
        self.cluster.start(node)
        self.cluster.wait_until_idle([node])

    def _disk_full(self) -> None:
        filler = self.disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
        time.sleep(self.dice.uniform(10.0, 25.0))
        filler.unlink()

    def _unreadable(self) -> None:
        """And a rank dies: who starts again cannot read."""
        self.eio.touch()
        self._rank().signal(signal.SIGKILL)
        time.sleep(self.dice.uniform(10.0, 25.0))
        self.eio.unlink()


def start(folder: Path, beton: Path, disk: Path, eio: Path) -> RunDirectory:
    """Submits a run that is far from its end after hours."""
    library = folder / "refusing_open.so"
    source = harness.ROOT / "tests" / "programs" / "refusing_open.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    configuration = harness.config(beton, "soak", epochs=5000, every=EVERY)
    run = create_run(configuration, folder)
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(disk)
    environment = {
        "PYTHONPATH": str(harness.ROOT),
        "MOKD_PAUSE_SECONDS": str(PAUSE_SECONDS),
        "LD_PRELOAD": str(library),
        "REFUSE_PATH": "/checkpoints/step-",
        "REFUSE_TIMES": "1000000",
        "REFUSE_ERRNO": str(errno.EIO),
        "REFUSE_WHILE": str(eio),
    }
    limits = {"startup": 240, "hang": 30, "evaluate": 60, "save": 60}
    seconds = {f"{name}_timeout_seconds": limit for name, limit in limits.items()}
    cluster = harness.cluster_config(nodes=NODES, environment=environment, **seconds)
    submit(run, cluster, entry="tests.programs.train_slowly:run")
    return run


def strike(faults: Faults, minutes: float) -> list[dict[str, Any]]:
    """Does harm until the time is up; what was done when, at which step."""
    began, struck, repertoire = time.monotonic(), [], faults.all()
    while True:
        time.sleep(faults.dice.uniform(30.0, 120.0))
        after = time.monotonic() - began
        if after > 60.0 * minutes:
            return struck
        name = faults.dice.choice(sorted(repertoire))
        step = int(faults.run.read_status().get("step", 0))
        print(f"{after:6.0f} s  step {step:5}  attempt {faults.run.current_attempt():3}  {name}", flush=True)
        struck.append({"seconds": round(after), "step": step, "fault": name})
        repertoire[name]()
        state = read_status(faults.run)
        if state.state in harness.FINAL:
            raise SystemExit(f"the run has ended: {state.state}: {state.reason}\n{harness.logs(faults.run)}")


def end(run: RunDirectory) -> None:
    """Cancels the run, once it trains, and waits for the save."""
    harness.wait_for_step(run, 1, run.current_attempt(), 400.0)
    with suppress(UserError):
        cancel(run)
    harness.wait_until_final(run)
    harness.wait_for("the ranks to leave", lambda: not harness.ranks(run))


def undisturbed(run: RunDirectory, folder: Path) -> RunDirectory:
    """The same run to the same step, with nothing in its way."""
    config = run.config()
    optim = config.optim.model_copy(update={"max_steps": checkpoint_step(run)})
    calm = RunDirectory.create(folder / "calm", config.model_copy(update={"name": "calm", "optim": optim}))
    assert train_locally(calm.path, NODES) == 0
    return calm


def differences(run: RunDirectory, calm: RunDirectory) -> list[str]:
    """What is not as in the undisturbed run."""
    mine, theirs = harness.evaluations(run), harness.evaluations(calm)
    same = {
        "weights": harness.weights(run) == harness.weights(calm),
        "steps in metrics.jsonl": harness.logged_steps(run) == list(range(1, checkpoint_step(run) + 1)),
        "losses": harness.losses_by_step(run) == harness.losses_by_step(calm),
        "steps in TensorBoard": harness.board_steps(run) == harness.board_steps(calm),
        "evaluations": bool(mine) and all(theirs[step] == found for step, found in mine.items()),
    }
    return [name for name, is_same in same.items() if not is_same]


def soak(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """All of it; the record of what was done and found."""
    beton, disk, eio = harness.make_images(folder), folder / "disk", folder / "eio"
    disk.mkdir()
    tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if subprocess.run(tmpfs, check=False, capture_output=True).returncode:
        print("no permission to mount a small file system: no disk will be full")
    cluster = harness.open_cluster()
    try:
        os.environ["SLURM_CONF"] = str(cluster.conf)
        os.environ["PYTHONPATH"] = str(harness.ROOT)
        cluster.up(harness.options(nodes=NODES))
        run = start(folder, beton, disk, eio)
        harness.wait_for_step(run, 1)
        struck = strike(Faults(cluster, run, disk, eio, random.Random(seed)), minutes)
        end(run)
        print(goodput(run).line(), flush=True)
        # all of it before the disk with the checkpoints goes
        return {
            "minutes": minutes,
            "seed": seed,
            "steps": checkpoint_step(run),
            "attempts": run.current_attempt(),
            "endings": [ending.kind for ending in Records(run).endings()],
            "faults": struck,
            "most_lost": max(harness.lost_steps(run), default=0),
            "goodput": goodput(run).line(),
            "useful_fraction": round(goodput(run).useful_fraction, 4),
            "differences": differences(run, undisturbed(run, folder)),
            "machine": machine.describe(["torch", "ffcv", "submitit"], ["launcher", "mokd", "data_pipeline", "tests"]),
        }
    finally:
        cluster.down()
        if os.path.ismount(disk):
            subprocess.run(["umount", "-l", str(disk)], check=True)


def main(arguments: list[str]) -> int:
    """The command line; status 1 when anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="of faults, before the comparison")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their times")
    parser.add_argument("--record", type=Path, help="write what was found as JSON")
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="mokd-soak-"))
    record = soak(folder, given.minutes, given.seed)
    if given.record:
        given.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['steps']} steps, {record['attempts']} attempts, {len(record['faults'])} faults")
    if record["differences"]:
        print(f"different from the undisturbed run: {', '.join(record['differences'])}; kept: {folder}")
        return 1
    print("the same as the undisturbed run: weights, optimisers, centres, losses, evaluations")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
