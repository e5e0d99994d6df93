"""Which settings make both branches gain: successive halving over variants of a configuration, every trial on record.

usage: python -m benchmarks.trials CONFIG --try 'KEY=VALUE ...' [--try ...] [--rungs 1,2,6] [--seeds 0] [--root runs]
       python -m benchmarks.trials --split FOLDER OUT [--part 0.2]

A rung is a number of epochs, with whole schedules. All variants are trained for the first; the better half of them goes
on to the next, and so forth. What counts is the gain of the branch that gains least, in k-NN, against baselines of the
same length. Lines are added to benchmarks/results/trials.jsonl, failures too. Settings are not to be chosen by the test
images: --split deals the images of a folder into two list files for `mokd convert`, to train on and to choose by.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gain import PACKAGES, SOURCES, Say, Stopped, run
from benchmarks.machine import ROOT, describe
from data_pipeline.core import schema
from data_pipeline.core.errors import DataError, UserError
from mokd.config import RunConfig, load_config
from mokd.distributed.local_ranks import leave_at_once
from mokd.runs.exit_codes import EXIT_STOPPED

LONGEST_NAME = 150  # a run's directory has its seed and branch in its name too, and file systems end at 255
RECORD = ROOT / "benchmarks" / "results" / "trials.jsonl"
Variant = tuple[str, ...]


def halving(
    config: RunConfig,
    variants: Sequence[Variant],
    rungs: Sequence[int],
    seeds: Sequence[int],
    root: Path,
    nproc: int,
    record: Path,
    say: Say,
) -> list[tuple[Variant, float]]:
    """The variants of the last rung, best first, with the gain of the branch that gains least.

    Called again it goes on where it was: finished runs are taken as they are. `Stopped` as `gain.run`.
    """
    going: list[tuple[Variant, float]] = [(variant, 0.0) for variant in variants]
    for number, epochs in enumerate(rungs):
        say(f"{len(going)} variants for {epochs} epochs")
        found = []
        for variant, _ in going:
            line = trial(config, variant, epochs, seeds, root, nproc, say)
            _add(record, line)
            if "least_gain" in line:
                found.append((variant, line["least_gain"]))
        found.sort(key=lambda item: -item[1])
        last = number + 1 == len(rungs)
        going = found if last else found[: -(-len(found) // 2)]
    return going


def trial(
    config: RunConfig, variant: Variant, epochs: int, seeds: Sequence[int], root: Path, nproc: int, say: Say
) -> dict[str, Any]:
    """What is recorded of a variant: gains with intervals by branch, or why there are none."""
    told = "-".join(variant)
    if len(told) > LONGEST_NAME:
        told = hashlib.sha256(told.encode()).hexdigest()[:12]  # of a directory; the line has the variant
    name = "-".join(filter(None, [config.name, told, f"{epochs}-epochs"]))
    line: dict[str, Any] = {"config": config.name, "variant": list(variant), "epochs": epochs, "seeds": list(seeds)}
    try:
        changed = _changed(config, variant, epochs, name)
        line["chosen_by"] = str(changed.evaluation.test)
        comparison = run([changed], seeds, ["knn"], root, nproc, say).comparisons["knn"].document()
        branches = comparison["branches"]
        line["branches"] = {b: {k: branches[b][k] for k in ("solo", "pair", "gain", "ci95")} for b in branches}
        line["least_gain"] = min(found["gain"] for found in branches.values())
        line["mean_gain"] = round(statistics.mean(found["gain"] for found in branches.values()), 3)
    except (DataError, UserError) as error:
        line["failed"] = str(error)
    return {**line, "machine": describe(PACKAGES, SOURCES)}


def _changed(config: RunConfig, variant: Variant, epochs: int, name: str) -> RunConfig:
    overrides = [*variant, f"optim.epochs={epochs}"]
    raw = schema.apply_overrides(config.model_dump(mode="json"), overrides)
    short = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return schema.validate(RunConfig, {**raw, "name": short}, f"variant {' '.join(variant) or 'as it is'}")


def _add(record: Path, line: dict[str, Any]) -> None:
    """Adds a line that does not stand there yet: called again, finished runs answer as before, at another time."""
    record.parent.mkdir(parents=True, exist_ok=True)
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    if any({**json.loads(old), "machine": None} == {**line, "machine": None} for old in lines):
        return
    with open(record, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def split(folder: Path, out: Path, part: float, seed: int = 0) -> tuple[Path, Path]:
    """Two lists of images (path, class) for `mokd convert`: to train on, and `part` of every class to choose by."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise UserError(f"{folder}: has no folders; give a folder of class folders")
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for path in classes:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        held = set(rng.permutation(len(files))[: round(part * len(files))].tolist())
        for i, file in enumerate(files):
            rows["validation" if i in held else "train"].append((str(file.absolute()), path.name))
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(lines)
    return out / "train.csv", out / "validation.csv"


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: write them as 1,2,6") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--try", dest="variants", action="append", default=[], metavar="'KEY=VALUE ...'")
    parser.add_argument("--rungs", default="1,2,6", help="epochs, increasing")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--split", nargs=2, type=Path, metavar=("FOLDER", "OUT"))
    parser.add_argument("--part", type=float, default=0.2, help="of every class, to choose by")
    options = parser.parse_args(arguments)
    try:
        if options.split:
            print(*split(*options.split, options.part), sep="\n")
            return 0
        if options.config is None:
            parser.error("give a configuration, or --split")
        rungs, seeds = _numbers("--rungs", options.rungs), _numbers("--seeds", options.seeds)
        variants: list[Variant] = [(), *(tuple(text.split()) for text in options.variants)]
        config = load_config(options.config)
        where = (options.root, options.nproc, options.record)
        for variant, gain in halving(config, variants, rungs, seeds, *where, say=lambda text: print(text, flush=True)):
            print(f"{gain:+.2f}  {' '.join(variant) or 'as it is'}")
    except Stopped:
        return EXIT_STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # after images were read here and ranks started, the ordinary end waits for ever for Numba's threads (TBB), which
    # Numba has ended before the fork
    leave_at_once(main())
