"""`mokd bench ...`: the benchmarks of the checkout."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from launcher.cli.compare import show
from launcher.cli.console import AsJson, Root, find_config, print_json, print_table, say
from mokd.config import RunConfig, load_config
from mokd.runs.exit_codes import EXIT_STOPPED

ROOT = Path(__file__).resolve().parents[2]

# what the benchmarks of the step take unless told otherwise; it is not among the configurations for training
STEP_CONFIG = ROOT / "benchmarks" / "step.yaml"

StepConfig = Annotated[str, typer.Argument(help="configuration; default: a small pair")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ...")]
Quick = Annotated[bool, typer.Option("--quick", help="one short round: does it run?")]
Record = Annotated[bool, typer.Option("--record", help="keep the figures in benchmarks/results/")]

bench = typer.Typer(
    help="Measure this machine: loaders, conversion, the step, its memory, saving, resuming.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Adds `mokd bench`."""
    app.add_typer(bench, name="bench")


def benchmark_module(name: str) -> Any:
    """A module of `benchmarks/`, which is part of a checkout and not of an installed package."""
    if not (ROOT / "benchmarks").is_dir():
        raise UserError("bench: the benchmarks are part of the source checkout; install from it with make setup")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.{name}")


def _answered(name: str, result: dict[str, Any], record: bool, as_json: bool) -> bool:
    """Keeps the figures, or prints them as JSON, where that is asked for; whether they are printed."""
    if record:
        folder = ROOT / "benchmarks" / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        print_json(result)
    return as_json


@bench.command(epilog="Example: mokd bench data --images imagenet/val --json")
def data(
    images: Annotated[Path, typer.Option(help="folder of JPEGs to measure with")] = Path(".data/imagenet_sample"),
    quick: Quick = False,
    record: Annotated[bool, typer.Option("--record", help="keep figures and plot in benchmarks/")] = False,
    as_json: AsJson = False,
) -> None:
    """Loaders and converters against torchvision with Pillow and FFCV's writer, on the same images."""
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; choose the pictures with --images FOLDER")
    benchmark = benchmark_module("data")
    effort = benchmark.QUICK if quick else benchmark.Effort()
    result = benchmark.run(images, effort, say)
    if record:
        benchmark_module("data_plot").plot(result, ROOT / "benchmarks" / "data.png")
    if _answered("data", result, record, as_json):
        return
    rates = [[name, f"{rate:,.0f}"] for name, rate in result["images_per_second"].items()]
    print_table("images per second", ["contender", "median"], rates)
    print_table("ratios", ["what", "times"], [[name, f"{ratio:.2f}"] for name, ratio in result["ratios"].items()])


@bench.command(epilog="Example: mokd bench resume demo.yaml --json")
def resume(
    config: Annotated[str, typer.Argument(help="configuration to train with, as for `mokd train`")] = "demo.yaml",
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="where to save, to measure its disk; default: temporary")] = None,
    record: Annotated[bool, typer.Option("--record", help="keep the figures in benchmarks/")] = False,
    as_json: AsJson = False,
) -> None:
    """How long training stands still for a save, and what a stop and a restart take, by part.

    A configuration that evaluates while training is also asked to stop amid an evaluation.
    """
    from mokd.training.feasibility import check  # imports torch

    run_config = load_config(find_config(config), overrides or [])
    check(run_config, 1)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    result = benchmark_module("resume").run(run_config, folder, say)
    if _answered("resume", result, record, as_json):
        return
    rows = [[f"save, {name}", f"{seconds:.3f} s"] for name, seconds in result["save_stall_seconds"].items()]
    rows.append(["resumed, first step", f"{result['first_step_seconds']:.1f} s"])
    rows += [[f"restart: {part}", f"{seconds:.2f} s"] for part, seconds in result["restart_seconds"].items()]
    rows.append(["verifying a checkpoint, alone", f"{result['verify_seconds']:.2f} s"])
    if answers := result["evaluation_stop_seconds"]:
        rows.append(["evaluation broken off", f"{answers['median']:.2f} s, at most {answers['max']:.2f} s"])
    rows.append(["checkpoint", f"{result['checkpoint_bytes'] / 2**20:.1f} MiB"])
    print_table("seconds without training", ["what", "median"], rows)


@bench.command(epilog="Example: mokd bench step vit_s_resnet50.yaml optim.global_batch=64 --json")
def step(
    config: StepConfig = str(STEP_CONFIG),
    overrides: Overrides = None,
    quick: Quick = False,
    record: Record = False,
    as_json: AsJson = False,
) -> None:
    """Our training step against a plain one of the same mathematics, on a synthetic batch; one process.

    optim.global_batch is the batch of this process.
    """
    benchmark = benchmark_module("step")
    result = _measure(benchmark, config, overrides, quick)
    if _answered("step", result, record, as_json):
        return
    about = result["config"]
    title = f"{' + '.join(about['branches'])}, {about['views']} px, K = {about['prototypes']}, batch {about['batch']}"
    rates = [[name, f"{rate:,.2f}"] for name, rate in result["images_per_second"].items()]
    print_table(title, ["images per second", "median"], rates)
    print_table("ratios", ["what", "times"], [[name, f"{ratio:.2f}"] for name, ratio in result["ratios"].items()])
    print_table("phases of our step", ["phase", "ms"], [[k, f"{ms:.1f}"] for k, ms in result["phases_ms"].items()])


@bench.command(epilog="Example: mokd bench scaling vit_s_resnet50.yaml --json")
def scaling(
    config: StepConfig = str(STEP_CONFIG),
    overrides: Overrides = None,
    quick: Quick = False,
    record: Record = False,
    as_json: AsJson = False,
) -> None:
    """The step on 1, 2 and 4 ranks where this machine has places for them; other scales computed, and marked so.

    optim.global_batch is the batch of one rank.
    """
    result = _measure(benchmark_module("scaling"), config, overrides, quick)
    if _answered("scaling", result, record, as_json):
        return
    rows = [[n, f"{rate:,.2f}", f"{result['efficiency'][n]:.2f}"] for n, rate in result["images_per_second"].items()]
    print_table("measured", ["ranks", "images per second", "efficiency"], rows)
    computed = result["computed"]["efficiency"]
    rows = [[link, *(f"{value:.2f}" for value in by_world.values())] for link, by_world in computed.items()]
    print_table("computed, not measured: efficiency", ["link", *(f"{n} ranks" for n in computed[rows[0][0]])], rows)


@bench.command(epilog="Example: mokd bench memory vit_s_resnet50.yaml --limit-gb 60 --json")
def memory(
    config: StepConfig = str(STEP_CONFIG),
    overrides: Overrides = None,
    limit_gb: Annotated[float | None, typer.Option(min=0.1, help="default: the memory that is free now")] = None,
    record: Record = False,
    as_json: AsJson = False,
) -> None:
    """The largest batch per GPU (or process, on CPUs) that fits, found by trying ever larger ones."""
    given = _configuration(config, overrides)
    limit_mb = None if limit_gb is None else limit_gb * 1024
    result = benchmark_module("memory").run(given, limit_mb, say)
    if _answered("memory", result, record, as_json):
        return
    print(f"largest batch {result['largest_batch']}: {result['peak_mb']:,.0f} of {result['limit_mb']:,.0f} MB")


def _configuration(config: str, overrides: list[str] | None) -> RunConfig:
    """What a benchmark of the step takes; the default one where only overrides are given."""
    given = overrides or []
    if "=" in config:
        config, given = str(STEP_CONFIG), [config, *given]
    return load_config(find_config(config), given)


@bench.command(epilog="Example: mokd bench gain --config cifar10_cpu.yaml --seeds 0,1 --nproc 2 --json --record")
def gain(
    config: Annotated[
        list[str] | None, typer.Option(help="configuration; repeatable; default: cifar10_cpu.yaml")
    ] = None,
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "0",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value; repeatable")] = None,
    task: Annotated[list[str] | None, typer.Option(help="evaluation; repeatable; default: knn and linear")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="ranks to start on this machine")] = 1,
    root: Root = Path("runs"),
    record: Annotated[bool, typer.Option("--record", help="keep figures and plots in benchmarks/results/")] = False,
    as_json: AsJson = False,
) -> None:
    """Train pairs and each of their branches alone, evaluate all, compare. Called again, it goes on where it was."""
    from mokd.comparison.plots import plot

    if not re.fullmatch(r"\d+(,\d+)*", seeds):
        raise UserError(f"--seeds {seeds}: write them as 0,1,2")
    numbers = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    configs = [load_config(find_config(name), overrides or []) for name in config or ["cifar10_cpu.yaml"]]
    benchmark = benchmark_module("gain")
    try:
        result = benchmark.run(configs, numbers, task or ["knn", "linear"], root, nproc, say)
    except benchmark.Stopped:
        say("stopped at a step boundary; the same command goes on there")
        raise typer.Exit(EXIT_STOPPED) from None
    name = f"gain-{'+'.join(given.name for given in configs)}"
    answered = _answered(name, result.document, record, as_json)
    for kind, comparison in result.comparisons.items():
        if record:
            plot(comparison, ROOT / "benchmarks" / "results" / f"{name}-{kind}.png")
        if not answered:
            show(comparison)


def _measure(benchmark: Any, config: str, overrides: list[str] | None, quick: bool) -> dict[str, Any]:
    step = benchmark_module("step")
    given = _configuration(config, overrides)
    return benchmark.run(given, step.QUICK if quick else step.Effort(), say)
