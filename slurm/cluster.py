"""Start and stop munge, slurmctld and several slurmd on this machine, all under one folder.

    slurm/up [--nodes 4] [--send-user-signal] [--grace-seconds 30] ...
    slurm/down

Nothing outside the state folder is touched, except that root gets a link /etc/slurm/slurm.conf when there is none,
so that plain `squeue` works. `down` stops the processes that `up` recorded, by process id, and no others.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slurm.config import Options, gpu_files, gres_conf, slurm_conf

DEFAULT_STATE = Path(__file__).resolve().parents[1] / ".slurm"
ETC_LINK = Path("/etc/slurm/slurm.conf")
PACKAGES = ("slurm-wlm", "munge")
MAX_SOCKET_PATH = 100  # the kernel's limit on the path of a socket is 108 bytes


class ClusterError(Exception):
    """The cluster cannot be started or asked; the message says what to do."""


def _process_start(pid: int) -> str | None:
    """The kernel's start time of a process, which together with its id names it for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields_after_name = stat.rpartition(")")[2].split()
    return None if fields_after_name[0] == "Z" else fields_after_name[19]


class Cluster:
    """The cluster whose files lie under `state`."""

    def __init__(self, state: Path = DEFAULT_STATE):
        self.state = state.absolute()
        self.conf = self.state / "slurm.conf"
        self._record = self.state / "processes.json"

    # --- life cycle

    def up(self, options: Options | None = None) -> None:
        """Start what is not running; with other options than it runs with, restart it."""
        options = options or Options()
        install()
        if len(str(self.state / "munge/socket")) > MAX_SOCKET_PATH:
            raise ClusterError(f"{self.state}: path too long for a socket; choose another with --state")
        if self._recorded() and self._options() != options:
            self.down()
        for folder in ("", "munge", "ctld", "log", *(f"spool-{name}" for name in options.node_names())):
            (self.state / folder).mkdir(parents=True, exist_ok=True, mode=0o755)
        (self.state / ".gitignore").write_text("*\n")
        for path in (path for paths in gpu_files(self.state, options).values() for path in paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_symlink():
                path.symlink_to("/dev/null")  # slurmd insists on a device
        self.conf.write_text(slurm_conf(self.state, options))
        (self.state / "gres.conf").write_text(gres_conf(self.state, options))
        (self.state / "options.json").write_text(json.dumps(asdict(options)))
        key = self.state / "munge/key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(secrets.token_bytes(128))
        self.start("munged")
        self.start("slurmctld")
        for name in options.node_names():
            self.start(name)
        self._link()
        self.wait_until_idle(options.node_names())

    def down(self) -> None:
        """Stop every process that `up` started, end its jobs, and forget the queue."""
        self.clear()
        recorded = self._recorded()
        for name in sorted(recorded, key=lambda name: name == "munged"):
            self.stop(name)
        if ETC_LINK.is_symlink() and Path(os.readlink(ETC_LINK)) == self.conf:
            ETC_LINK.unlink()
        for folder in self.state.glob("spool-*"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.state / "ctld", ignore_errors=True)

    def clear(self) -> None:
        """Cancel every job and wait until their processes are gone."""
        if "slurmctld" not in self._recorded():
            return
        self._quietly("scancel", "--user", str(os.getuid()))
        for step in self._quietly("squeue", "-hs", "-o", "%i").split():
            if step.rpartition(".")[2].isdigit():
                self._quietly("scancel", "--signal=KILL", step)
        deadline = time.monotonic() + 20.0
        while self._quietly("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def start(self, name: str) -> None:
        """Start one daemon (`munged`, `slurmctld` or a node's name) unless it runs."""
        if name in self._recorded():
            return
        munge = self.state / "munge"
        commands = {
            "munged": [
                *("munged", "--foreground", "--force", "--num-threads=2"),
                *(f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
                *(f"--seed-file={munge}/seed", f"--log-file={munge}/log"),
            ],
            "slurmctld": ["slurmctld", "-D", "-f", str(self.conf)],
        }
        command = commands.get(name, ["slurmd", "-D", "-f", str(self.conf), "-N", name])
        with (self.state / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": _path(), "SLURM_CONF": str(self.conf)},
            )
        self._write(self._recorded() | {name: (process.pid, _process_start(process.pid) or "")})
        self._await_ready(name, process)

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop one daemon, with SIGKILL if it does not leave within ten seconds."""
        recorded = self._recorded()
        if name not in recorded:
            return
        pid, started = recorded.pop(name)
        for attempt, number in enumerate((how, signal.SIGKILL)):
            if _process_start(pid) == started:
                os.kill(pid, number)
            deadline = time.monotonic() + 10.0
            while _process_start(pid) == started and time.monotonic() < deadline:
                _reap(pid)
                time.sleep(0.05)
            if _process_start(pid) != started or attempt:
                break
        _reap(pid)
        self._write(recorded)

    def wipe_spool(self, node: str) -> None:
        """Forget what a killed slurmd knew: without it a restarted one revives steps that are long dead."""
        shutil.rmtree(self.state / f"spool-{node}", ignore_errors=True)
        (self.state / f"spool-{node}").mkdir(mode=0o755)

    # --- questions

    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands talk to this cluster."""
        return {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.conf)}

    def run(self, *command: str, timeout: float = 60.0) -> str:
        """The output of a SLURM command; ClusterError when it fails."""
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def ask(self, *command: str) -> str:
        """What a SLURM command says, whether it succeeds or not."""
        try:
            return self.run(*command)
        except ClusterError as error:
            return str(error)

    def nodes(self) -> list[str]:
        """The names of its nodes."""
        return (self._options() or Options()).node_names()

    def pid(self, name: str) -> int:
        """The process id of a running daemon."""
        return self._recorded()[name][0]

    def wait_until_idle(self, nodes: Sequence[str], seconds: float = 60.0) -> None:
        """Wait until the given nodes can take jobs, bringing back the ones marked down."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = dict(line.split() for line in self._quietly("sinfo", "-hN", "-o", "%N %T").splitlines())
            if all(states.get(node) in ("idle", "allocated", "mixed") for node in nodes):
                return
            for node in nodes:
                if states.get(node, "").rstrip("*") in ("down", "drained", "drain", "draining"):
                    self._quietly("scontrol", "update", f"NodeName={node}", "State=RESUME")
            time.sleep(0.3)
        raise ClusterError(f"nodes not ready after {seconds:.0f} s: {states}; see {self.state}/log")

    # --- details

    def _await_ready(self, name: str, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._write({k: v for k, v in self._recorded().items() if k != name})
                raise ClusterError(f"{name} left with status {process.returncode}; see {self.state}/log/{name}.out")
            if name == "munged" and (self.state / "munge/socket").exists():
                return
            if name == "slurmctld" and "is UP" in self._quietly("scontrol", "ping"):
                return
            if name not in ("munged", "slurmctld") and (self.state / f"slurmd-{name}.pid").exists():
                return
            time.sleep(0.1)
        raise ClusterError(f"{name} is not ready after {seconds:.0f} s; see {self.state}/log")

    def _quietly(self, *command: str) -> str:
        try:
            return self.run(*command, timeout=20.0)
        except (ClusterError, subprocess.TimeoutExpired):
            return ""

    def _options(self) -> Options | None:
        try:
            return Options(**json.loads((self.state / "options.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _recorded(self) -> dict[str, tuple[int, str]]:
        """The daemons that `up` started and that still run."""
        try:
            recorded = json.loads(self._record.read_text())
        except (OSError, ValueError):
            return {}
        for pid, _ in recorded.values():
            _reap(pid)
        return {name: (pid, start) for name, (pid, start) in recorded.items() if _process_start(pid) == start}

    def _write(self, recorded: dict[str, tuple[int, str]]) -> None:
        beside = self._record.with_suffix(".new")
        beside.write_text(json.dumps(recorded, indent=1))
        beside.replace(self._record)

    def _link(self) -> None:
        if os.geteuid() == 0 and not ETC_LINK.exists() and self.state == DEFAULT_STATE:
            ETC_LINK.parent.mkdir(parents=True, exist_ok=True)
            ETC_LINK.unlink(missing_ok=True)
            ETC_LINK.symlink_to(self.conf)


def install() -> None:
    """Install SLURM and munge where they are missing and may be; ClusterError with the command otherwise."""
    if all(shutil.which(program, path=_path()) for program in ("slurmctld", "slurmd", "munged", "sbatch")):
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterError(f"SLURM is missing; install it with: sudo {' '.join(command)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update", "-qq"], command):
        subprocess.run(step, env=quiet, check=True, stdout=sys.stderr)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def _reap(pid: int) -> None:
    """Collect a child of ours that has ended; daemons started by another process are not ours to collect."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def main(arguments: Sequence[str]) -> int:
    """The command line behind `slurm/up` and `slurm/down`."""
    parser = argparse.ArgumentParser(prog="slurm/cluster.py", description="A SLURM cluster on this machine.")
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--state", type=Path, default=Path(os.environ.get("MOKD_SLURM_STATE", DEFAULT_STATE)))
    for field in fields(Options):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", default=field.default)
        else:
            parser.add_argument(flag, type=int, default=field.default)
    given = vars(parser.parse_args(arguments))
    action, cluster = given.pop("action"), Cluster(given.pop("state"))
    try:
        if action == "down":
            cluster.down()
            return 0
        cluster.up(Options(**given))
    except ClusterError as error:
        print(f"slurm: {error}", file=sys.stderr)
        return 1
    print(f"{given['nodes']} nodes are up. In other shells: export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
