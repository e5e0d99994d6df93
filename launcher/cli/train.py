"""`mokd config` and `mokd train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from data_pipeline.core.schema import dump_yaml
from launcher.cli.console import AsJson, Overrides, Root, find_config, print_json, print_table, say
from launcher.config import load_cluster
from mokd.comparison.solo import load_run_config
from mokd.config import RunConfig, load_config
from mokd.runs.run_directory import RunDirectory

Solo = Annotated[
    str | None, typer.Option(metavar="BRANCH", help="train this branch alone, everything else equal: its baseline")
]


def register(app: typer.Typer) -> None:
    """Adds the commands around one run."""
    app.command(epilog="Example: mokd config vit_s_resnet50.yaml optim.epochs=5")(config)
    app.command(epilog="Example: mokd train configs/demo.yaml --nproc 2 optim.epochs=3")(train)


def config(
    config: Annotated[str | None, typer.Argument(help="a configuration file, or its bare name in configs/")] = None,
    overrides: Overrides = None,
    keys: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="what the keys mean that begin so, for example optim or views.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="look at networks, data, first weights and cluster too, as a launch does")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the keys and values of a configuration and print it with every default written out."""
    if keys is not None:
        _print_keys(keys, as_json)
        return
    if config is None:
        raise UserError("config: give a configuration, for example: mokd config demo.yaml; or --keys optim")
    resolved = load_config(find_config(config), overrides or [])
    if check:
        from launcher.slurm import container
        from mokd.training.feasibility import check as check_run  # imports torch

        cluster = container.settle(load_cluster(resolved.cluster, {}, config), local=False)
        check_run(resolved, cluster.world_size)
    if as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        print(dump_yaml(resolved), end="")


def _print_keys(prefix: str, as_json: bool) -> None:
    from dataclasses import asdict

    from launcher.first_steps import reference

    found = [key for key in reference.all_keys() if key.name.startswith(prefix)]
    if not found:
        sections = dict.fromkeys(key.name.partition(".")[0] for key in reference.all_keys())
        raise UserError(f"--keys {prefix}: no key begins so; sections: {', '.join(sections)}")
    if as_json:
        print_json({"keys": [asdict(key) for key in found]})
        return
    for key in found:
        print(f"{key.name} = {key.default or '(to be given)'}   [{key.allowed}]\n    {key.meaning}")


def train(
    config: Annotated[str, typer.Argument(help="a configuration file, or its bare name in configs/")],
    overrides: Overrides = None,
    solo: Solo = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks to start on this machine")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run if it exists")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="begin at step 0; what the run has is kept aside")] = False,
    root: Root = Path("runs"),
) -> None:
    """Train on this machine. Stops at a step boundary on Ctrl-C or SIGTERM; --resume continues there.

    Exit status: 0 done, 75 stopped and resumable, 1 failed, 2 a mistake in what was given.
    """
    from mokd.runs.exit_codes import EXIT_STOPPED
    from mokd.training.start import first_of_ranks
    from mokd.training.start import train as start

    resolved = load_run_config(find_config(config), overrides or [], solo)
    run, status = start(resolved, root, resume=resume, restart=restart, nproc=nproc)
    if not first_of_ranks():
        raise typer.Exit(status)
    if status == 0:
        show_progress(run, resolved)
        print(f"evaluate     mokd eval {run.path} --task knn\nlook         mokd report {run.path}")
    elif status == EXIT_STOPPED:
        say("stopped at a step boundary; the same command with --resume continues there")
    raise typer.Exit(status)


def show_progress(run: RunDirectory, config: RunConfig) -> None:
    """How far each branch has come since step 0, the speed, and where to look."""
    from statistics import median

    from mokd.runs.metrics import read_metrics

    records = read_metrics(run.metrics_file)
    speeds = [r["images_per_second"] for r in records if r.get("images_per_second")]
    speed = f"{median(speeds):.1f}" if speeds else "-"
    rows = []
    for branch in config.branches:
        curve = [r for r in records if f"eval/{branch.name}/knn_top1" in r]
        values = [f"{r[f'eval/{branch.name}/knn_top1']:.1f}" for r in curve]
        rows.append([branch.name, values[0] if values else "-", values[-1] if values else "-", speed])
    columns = ["branch", "k-NN % before training", "k-NN % after", "images/s"]
    print_table(f"{run.path}: {records[-1]['step'] if records else 0} steps", columns, rows)
    print(f"curves       {run.metrics_file}\n             tensorboard --logdir {run.tensorboard}")
    print(f"checkpoint   {run.checkpoints}")
