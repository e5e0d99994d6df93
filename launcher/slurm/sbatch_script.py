"""Submission through submitit, with a batch script that supervises the ranks instead of hoping for them.

Stock submitit decides about requeueing inside rank 0's signal handler, which forfeits the other ranks' grace time and
knows nothing of sudden deaths. Here the batch script runs `launcher.slurm.supervisor`, which starts the ranks
(submitit's own `srun python -m submitit.core._submit`), learns how they ended, and requeues when the last has left.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils
from submitit.slurm.slurm import SlurmJob, _make_sbatch_string

from data_pipeline.core.errors import UserError
from launcher.config import ClusterConfig, minutes
from launcher.slurm import container
from mokd.runs.exit_codes import DECIDED

# how often the batch script itself tries again when not even the supervisor could start: a node without file system
BARE_RETRIES = 3

SETUP = [
    "umask 077",
    # a signal must not end the script before it has learnt how the ranks ended
    "trap 'export MOKD_SIGNALLED=SIGTERM' TERM",
    "trap 'export MOKD_SIGNALLED=SIGUSR2' USR2",
    "trap : USR1 CONT",
]
# The requeue policy is requeue_policy.py's. The shell keeps the one part that Python cannot: the case that Python, or
# the file system it lies on, is what did not start.
TEARDOWN = [
    "rc=$?",
    f"# {', '.join(map(str, DECIDED))} are the supervisor's own decision;",
    "# 138, 140, 143: a signal came before it had handlers;",
    "# anything else means that it could not do its work",
    'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"',
    'case "$rc" in',
    f"  {'|'.join(map(str, DECIDED))}) again=no ;;",
    "  138|140|143) again=yes ;;",
    f'  *) [ "${{SLURM_RESTART_COUNT:-0}}" -lt {BARE_RETRIES} ] && again=yes ;;',
    "esac",
    'if [ "$again" = yes ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
    '  scontrol requeue "$job"',
    "fi",
    "exit $rc",
]


def parameters(cluster: ClusterConfig, name: str) -> dict[str, Any]:
    """Submitit's parameters for a cluster section."""
    extra: dict[str, Any] = {"requeue": True}
    # `true` is a flag, `false` leaves a site's flag out
    extra |= {key.replace("_", "-"): value for key, value in cluster.sbatch.items() if value is not False}
    # the ranks refuse to train on CPUs instead
    exports = [f"export MOKD_GPUS_PER_NODE={cluster.gpus_per_node}"]
    exports += [f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()]
    optional = {
        key: getattr(cluster, key)
        for key in ("partition", "account", "qos", "constraint", "exclude")
        if getattr(cluster, key) is not None
    }
    if cluster.gpus_per_node and "gres" not in cluster.sbatch:  # where a site wants them asked for as `gres`
        optional["gpus_per_node"] = cluster.gpus_per_node
    return {
        "job_name": name,
        "time": minutes(cluster.time),
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "signal_delay_s": cluster.signal_lead_seconds,
        "array_parallelism": cluster.array_parallelism,
        "additional_parameters": extra,
        "setup": [*SETUP, *exports, *cluster.setup],
        "teardown": TEARDOWN,
        "wckey": None,  # submitit's default key is refused where keys are enforced
        **optional,
    }


class Script:
    """The batch script of a run, or of the runs of a sweep; `paths` are what a container must see."""

    def __init__(
        self,
        cluster: ClusterConfig,
        name: str,
        folder: Path,
        code: Path,
        supervised: Sequence[str],
        paths: Sequence[Path] = (),
    ):
        self.cluster, self.name, self.folder, self.code, self.paths = cluster, name, folder, code, paths
        self.supervised = supervised  # the supervisor's arguments, up to the command of the ranks

    def text(self, runs: int | None = None) -> str:
        """The script; `runs` is the length of a job array."""
        given = parameters(self.cluster, self.name)
        # the snapshot comes before anything installed, and before the working directory, which may be a checkout
        path = f'export PYTHONPATH={shlex.quote(str(self.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        given["setup"] = [*given["setup"], path, "export PYTHONSAFEPATH=1"]
        if container.surrounding():  # the supervisor's container has another, by which the nodes may find no runtime
            given["setup"].append(f'export {container.HOST_PATH}="$PATH"')
        return str(
            _make_sbatch_string(
                command=self._command(array=runs is not None),
                folder=self.folder,
                map_count=runs,
                use_srun=False,
                **given,
            )
        )

    def _command(self, array: bool) -> str:
        paths = utils.JobPaths(self.folder)
        logs = [str(path).replace("%j", "%A_%a" if array else "%j") for path in (paths.stdout, paths.stderr)]
        words = container.rank_words(self.cluster, self.paths, self.code)
        ranks = [
            *("srun", "--unbuffered", "--open-mode=append", "--output", logs[0], "--error", logs[1]),
            # since SLURM 22.05 a step does not inherit this from the job
            f"--cpus-per-task={self.cluster.cpus_per_task}",
            # a dead rank ends the step; the supervisor shortens SLURM's patience with the others
            "--kill-on-bad-exit=1",
            *self.cluster.srun,
            *words.srun,
            *(*words.python, "-m", "submitit.core._submit", str(self.folder)),
        ]
        python = container.batch_words(self.paths, self.code)
        return shlex.join([*python, "-m", "launcher.slurm.supervisor", *self.supervised, "--", *ranks])


class SupervisedExecutor(submitit.SlurmExecutor):
    """Submitit's executor with our batch script."""

    def __init__(self, script: Script):
        super().__init__(script.folder)
        self.script = script
        self._runs: int | None = None
        # what submitit reads back: the number of tasks of a job, and its length
        self.parameters = {
            "nodes": script.cluster.nodes,
            "ntasks_per_node": script.cluster.ranks_per_node,
            "time": minutes(script.cluster.time),
        }

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script.text(self._runs)

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[Any]:
        try:
            if len(delayed_submissions) == 1 and self._runs is None:
                return list(super()._internal_process_submissions(delayed_submissions))
            return self._submit_array(delayed_submissions)
        except utils.FailedJobError as error:
            raise UserError(f"sbatch refused the job: {_refusal(str(error))}") from None

    def _submit_array(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[Any]:
        # submitit builds its arrays with the stock executor, which would lose our script
        pickles = []
        for delayed in delayed_submissions:
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            pickles.append(self.folder / f"{uuid.uuid4().hex}.pkl")
            delayed.dump(pickles[-1])
        self._runs = len(delayed_submissions)
        first = self._submit_command(self._submitit_command_str)
        jobs = [SlurmJob(self.folder, f"{first.job_id}_{index}", first._tasks) for index in range(self._runs)]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs


def _refusal(text: str) -> str:
    """The line that says why, out of what submitit makes of sbatch's complaint."""
    lines = [line.strip() for line in text.splitlines() if "sbatch: error:" in line]
    return "; ".join(line.partition("sbatch: error:")[2].strip() for line in lines) or " ".join(text.split())
