"""`mokd launch`, `status`, `logs`, `cancel` and `resume`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from launcher.cli.cluster_options import Flags, with_cluster_options
from launcher.cli.console import find_config, messages, print_json, print_table
from launcher.cli.train import Solo
from launcher.config import ClusterConfig, load_cluster
from launcher.runs.goodput import goodput
from launcher.runs.records import Records
from launcher.slurm.status import FINAL, RunStatus, find_runs, read_status
from mokd.comparison.solo import load_run_config
from mokd.config import RunConfig, load_config
from mokd.runs.progress import duration
from mokd.runs.run_directory import RunDirectory

SHOWN_ALARMS = 5  # the newest; alarms.jsonl has all

Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, for example optim.epochs=5")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Run = Annotated[Path, typer.Argument(help="a run directory, or its name in runs/")]
Root = Annotated[Path, typer.Option(help="folder of the run directories")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print the batch script, submit nothing")]
Local = Annotated[bool, typer.Option("--local", help="run the same job on this machine")]


def register(app: typer.Typer) -> None:
    """Adds the commands around jobs."""
    app.command(epilog="Example: mokd launch vit_s_resnet50.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00")(launch)
    app.command(epilog="Example: mokd status runs/demo --json")(status)
    app.command(epilog="Example: mokd logs runs/demo --follow")(logs)
    app.command(epilog="Example: mokd cancel runs/demo")(cancel)
    app.command(epilog="Example: mokd resume runs/demo --nodes 2")(resume)


@with_cluster_options
def launch(
    flags: Flags,
    config: Annotated[str, typer.Argument(help="a configuration file, or its bare name in configs/")],
    overrides: Overrides = None,
    solo: Solo = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=value,value: one run per combination, as an array")
    ] = None,
    root: Root = Path("runs"),
    local: Local = False,
    dry_run: DryRun = False,
    check: Annotated[bool, typer.Option("--check", help="run `mokd doctor` on every node the run would get")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to SLURM: checked first, with a snapshot of the code, requeued until it is done."""
    from launcher.cli.doctor import check_nodes
    from launcher.preflight.checks import examine
    from launcher.preflight.resources import settle
    from launcher.runs import sweep as sweeps

    path = find_config(config)
    resolved = load_run_config(path, overrides or [], solo)
    cluster = load_cluster(resolved.cluster, flags, str(path))
    if not local:
        cluster = settle(cluster, resolved.parallel.device)
    if check:
        _need_slurm(local=False)
        raise typer.Exit(check_nodes(resolved, cluster, root, as_json=as_json))
    _show_findings(examine(resolved, cluster, root))
    if sweep:
        name = resolved.name
        configs = [
            load_run_config(path, [*(overrides or []), *point.overrides, f"name={name}-{point.suffix}"], solo)
            for point in sweeps.points(sweep)
        ]
        _launch_sweep(configs, cluster, root, name, dry_run=dry_run, local=local, as_json=as_json)
    else:
        _launch_one(resolved, cluster, root, dry_run=dry_run, local=local, as_json=as_json)


def _launch_one(
    config: RunConfig, cluster: ClusterConfig, root: Path, *, dry_run: bool, local: bool, as_json: bool
) -> None:
    from launcher.slurm import submit

    if dry_run:
        run = RunDirectory(submit.runnable_path(root / config.name))
        _show_plan(submit.run_script(run, cluster, 1), run.path, cluster, local, as_json)
        return
    _need_slurm(local)
    with submit.taken_back(root / config.name):
        run = submit.create_run(config, root)
        submitted = submit.submit_local(run, cluster) if local else submit.submit(run, cluster)
    _tell(submitted, as_json)


def _launch_sweep(
    configs: list[RunConfig],
    cluster: ClusterConfig,
    root: Path,
    name: str,
    *,
    dry_run: bool,
    local: bool,
    as_json: bool,
) -> None:
    from launcher.slurm import submit

    if local:
        raise UserError("--sweep needs SLURM's job arrays; leave out --local")
    folder = submit.runnable_path(root / f"{name}.sweep")
    if dry_run:
        for config in configs:
            print(f"# {config.name}", file=sys.stderr)
        _show_plan(submit.array_script(folder, cluster, name), folder, cluster, local, as_json, len(configs))
        return
    _need_slurm(local)
    if folder.exists():
        raise UserError(f"{folder}: this sweep exists already; set another name=...")
    from mokd.weights import initial

    for config in configs:  # each may start from other weights: all of them are looked at before the first run is made
        initial.check(config)
    with submit.taken_back(folder, *(root / config.name for config in configs)):
        runs = [submit.create_run(config, root) for config in configs]
        jobs = submit.submit_array(runs, folder, cluster, name)
    if as_json:
        print_json({"runs": [{"job_id": job.job_id, "run": str(job.run.path)} for job in jobs]})
        return
    for job in jobs:
        print(f"job {job.job_id}: {job.run.path}")


@with_cluster_options
def resume(
    flags: Flags,
    run: Run,
    overrides: Overrides = None,
    from_step: Annotated[int | None, typer.Option(help="go on from this checkpoint; later ones are kept aside")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="begin at step 0; what the run has is kept aside")] = False,
    update_code: Annotated[bool, typer.Option(help="run today's code instead of the run's own snapshot")] = False,
    local: Local = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Launch a run again from its newest checkpoint, if need be on another number of nodes."""
    from launcher.preflight.checks import examine
    from launcher.preflight.resources import settle
    from launcher.slurm import submit

    directory = open_run(run)
    if directory.read_status().get("state") == "done" and not restart and from_step is None:
        raise UserError(f"{directory.path}: this run is done; there is nothing to resume")
    config, last = load_config(directory.config_file, overrides or []), Records(directory).last_launch()
    # as launched last; with another site, as the configuration says
    as_before = last is not None and "site" not in flags
    section = {**last.cluster, "site": None} if last and as_before else config.cluster
    cluster = load_cluster(section, flags, str(directory.config_file))
    if not local and not as_before:
        cluster = settle(cluster, config.parallel.device)
    _show_findings(examine(config, cluster, directory.path.parent, directory))
    if dry_run:
        number = (last.number if last else 0) + 1
        _show_plan(submit.run_script(directory, cluster, number), directory.path, cluster, local, as_json)
        return
    _need_slurm(local)
    if restart:
        from mokd.checkpointing import choose
        from mokd.weights import initial

        submit.wait_for_the_last(directory)
        messages.print(f"what there was is in {choose.restart(directory)}", markup=False)
        initial.create_run(directory.path, config)
    elif overrides or from_step is not None:
        from mokd.training.start import change

        submit.wait_for_the_last(directory)
        change(directory, overrides or [], from_step)
    start = submit.submit_local if local else submit.submit
    _tell(start(directory, cluster, new_code=update_code), as_json)


def status(
    run: Annotated[Path | None, typer.Argument(help="a run directory, or its name in runs/; default: all runs")] = None,
    root: Root = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show what runs are doing: state, nodes, restarts and why, progress, speed, age of the last checkpoint."""
    if run is not None:
        directory = open_run(run, root)
        found, account = read_status(directory), goodput(directory)
        if as_json:
            print_json({**found.to_json(), "goodput": account.to_json()})
        else:
            _print_one(found)
            if account.attempts:
                print(f"goodput: {account.line()}")
        return
    every = [read_status(directory) for directory in find_runs(root)]
    if as_json:
        print_json({"runs": [found.to_json() for found in every]})
        return
    columns = ["run", "state", "step", "epoch", "images/s", "ETA", "restarts", "checkpoint", "nodes"]
    print_table(f"runs in {root}", columns, [_row(found) for found in every])


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="whose output")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run ends")] = False,
    lines: Annotated[int, typer.Option(help="how many of the last lines; 0 shows all")] = 50,
    root: Root = Path("runs"),
) -> None:
    """Show what a rank has written, over all restarts."""
    from launcher.runs.logs import follow as follow_logs
    from launcher.runs.logs import read_logs

    directory = open_run(run, root)
    for text in read_logs(directory, rank, lines or None):
        sys.stdout.write(text)
    if follow:
        for text in follow_logs(directory, rank, lambda: read_status(directory).state in FINAL):
            sys.stdout.write(text)
            sys.stdout.flush()


def cancel(run: Run, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Cancel a run's job. The ranks save first; `mokd resume` continues there."""
    from launcher.slurm.submit import cancel as cancel_job

    directory = open_run(run, root)
    job = cancel_job(directory)
    if as_json:
        print_json({"job_id": job, "run": str(directory.path)})
    else:
        print(f"job {job} cancelled; continue with: mokd resume {directory.path}")


def find_run(run: Path, root: Path = Path("runs")) -> Path:
    """Where a run lies, given by its path or by its name below `root`."""
    named = root / run
    return named if not (run / "config.yaml").is_file() and (named / "config.yaml").is_file() else run


def open_run(run: Path, root: Path = Path("runs")) -> RunDirectory:
    """A run by its path, or by its name below `root`."""
    return RunDirectory.open(find_run(run, root).absolute())


def _show_findings(findings: Any) -> None:
    messages.print(
        "; ".join(f"{name}: {value}" for name, value in findings.facts.items()), markup=False, soft_wrap=True
    )
    for warning in findings.warnings:
        messages.print(f"warning: {warning}", markup=False)


def _need_slurm(local: bool) -> None:
    from launcher.slurm import client
    from launcher.slurm.submit import NO_SLURM

    if not local and not client.available():
        raise UserError(NO_SLURM)


def _show_plan(
    script: Any, path: Path, cluster: ClusterConfig, local: bool, as_json: bool, runs: int | None = None
) -> None:
    from launcher.preflight.checks import ask_sbatch
    from launcher.slurm.submit import describe_local

    text = describe_local(cluster, path) if local else script.text(runs)
    refusal = None if local else ask_sbatch(script, runs)
    if refusal:
        messages.print(f"warning: sbatch would refuse this: {refusal}", markup=False)
    if as_json:
        print_json({"run": str(path), "script": text, "refusal": refusal})
    else:
        print(text)


def _tell(submitted: Any, as_json: bool) -> None:
    if as_json:
        print_json({"job_id": submitted.job_id, "run": str(submitted.run.path)})
        return
    print(f"job {submitted.job_id}: {submitted.run.path} (readable by you alone)")
    print(f"watch it with: mokd status {submitted.run.path}; mokd logs {submitted.run.path} --follow")


def _row(found: RunStatus) -> list[str]:
    steps = f"{found.step}/{found.total_steps}" if found.total_steps else str(found.step)
    age = found.checkpoint_age_seconds
    return [
        Path(found.run).name,
        found.state,
        steps,
        str(found.epoch),
        f"{found.images_per_second:.1f}" if found.images_per_second else "-",
        duration(found.eta_seconds) if found.eta_seconds is not None else "-",
        str(len(found.restarts)),
        f"step {found.checkpoint_step}, {duration(age)} ago" if age is not None else "-",
        found.nodes or "-",
    ]


def _print_one(found: RunStatus) -> None:
    columns = ["run", "state", "step", "epoch", "images/s", "ETA", "restarts", "checkpoint", "nodes"]
    rows = [[name, value] for name, value in zip(columns, _row(found), strict=True)]
    rows += [["job", found.job_id or "-"], ["attempt", str(found.attempt)], ["reason", found.reason or "-"]]
    if found.phase and found.phase_seconds is not None:
        rows.append(["phase", f"{found.phase}, for {duration(found.phase_seconds)}"])
    if (slow := found.slowest_rank) is not None:
        idle = duration(slow["seconds_without_progress"])
        rows.append(
            ["slowest rank", f"{slow['rank']} on {slow['host']}: {slow['phase']}, step {slow['step']}, {idle} ago"]
        )
    rows += [[f"changed at step {c['step']}", f"{c['key']}: {c['before']} -> {c['after']}"] for c in found.changes]
    if found.alarms:
        rows.append(["alarms", f"{len(found.alarms)}, of which {found.alarms_now} hold"])
    rows += [[f"alarm at step {a['step']}", f"{a['alarm']}: {a['advice']}"] for a in found.alarms[-SHOWN_ALARMS:]]
    rows += [[f"loss {branch}", f"{value:.3f}"] for branch, value in found.losses.items()]
    rows += [[f"restart at step {restart['step']}", restart["reason"]] for restart in found.restarts]
    print_table(found.run, ["", ""], rows)
