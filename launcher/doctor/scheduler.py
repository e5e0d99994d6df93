"""SLURM's commands, what this user may do with them, and munge."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from launcher.doctor.finding import Finding, Surroundings, last_line

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_CONF = Path("/etc/slurm/slurm.conf")


def slurm(here: Surroundings) -> Finding:
    """SLURM's commands are here, the controller answers, and takes a job from this user."""
    path = here.environ.get("PATH", "")
    missing = [name for name in COMMANDS if not shutil.which(name, path=path)]
    if len(missing) == len(COMMANDS):
        return Finding("warning", "not on this machine: only `mokd train` and --local work", "log in to the cluster")
    if missing:
        return Finding("problem", f"missing: {', '.join(missing)}", "apt-get install slurm-client")
    ping = here.run("scontrol", "ping", seconds=20.0)
    if "is UP" not in ping.stdout:
        why = last_line(ping.stdout + ping.stderr)
        return Finding("problem", f"the controller does not answer: {why}", "systemctl restart slurmctld  # as root")
    # inside of a job these variables would be taken for options
    bare = {k: v for k, v in here.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    script = "#!/bin/sh\ntrue\n"
    arguments = ["--test-only", "--time=1", "--output=/dev/null", *_own_partition(here)]
    done = Surroundings(environ=bare).run("sbatch", *arguments, given=script, seconds=30.0)
    if done.returncode:
        mend = "sacctmgr show assoc user=$USER; give --partition, --account and --qos that you may use"
        return Finding("problem", f"sbatch would refuse a job: {last_line(done.stderr)}", mend)
    version = here.run("sbatch", "--version").stdout.strip()
    return Finding("ok", f"{version}, the controller answers, jobs are taken")


def _own_partition(here: Surroundings) -> list[str]:
    """What says where and on whose account, if this is a job already."""
    options = {"partition": "SLURM_JOB_PARTITION", "account": "SLURM_JOB_ACCOUNT", "qos": "SLURM_JOB_QOS"}
    return [f"--{key}={here.environ[name]}" for key, name in options.items() if here.environ.get(name)]


def munge(here: Surroundings) -> Finding:
    """munge, by which SLURM knows who asks, gives out credentials and takes them back."""
    text = _slurm_conf(here)
    if not shutil.which("munge", path=here.environ.get("PATH", "")) or "auth/slurm" in text:
        return Finding("ok", "not used here")
    socket = re.search(r"^AuthInfo=.*?\bsocket=([^,\s]+)", text, re.MULTILINE | re.IGNORECASE)
    at = [f"--socket={socket[1]}"] if socket else []
    done = here.run("munge", "--no-input", *at, seconds=20.0)
    if done.returncode == 0:
        done = here.run("unmunge", *at, given=done.stdout, seconds=20.0)
    if done.returncode:
        if not text and not socket:  # no cluster is configured here: nobody asks munge anything
            return Finding("ok", f"not running, and no cluster is configured ({last_line(done.stderr)})")
        return Finding("problem", last_line(done.stderr), "systemctl restart munge  # as root")
    return Finding("ok", "gives and takes credentials")


def _slurm_conf(here: Surroundings) -> str:
    try:
        return Path(here.environ.get("SLURM_CONF") or _CONF).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # a cluster may keep its configuration with the controller
