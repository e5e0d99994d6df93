"""An export from a run to a folder: written aside, read back, then put in place."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError
from mokd.export.card import card
from mokd.export.formats import FORMATS
from mokd.export.reload import largest_difference
from mokd.export.source import held_sources
from mokd.runs.run_directory import RunDirectory


@dataclass(frozen=True)
class Export:
    """What was written. difference: of the features when read back, over the largest feature."""

    branch: str
    network: str
    step: int
    format: str
    folder: str
    difference: float


def export(
    run: RunDirectory, branch: str | None, kind: str, network: str, target: Path | None = None, *, replace: bool = False
) -> Iterator[Export]:
    """Writes one branch of a run, or each of them, as `kind` into RUN/export/<branch>-<network>-<kind>, or `target`.

    UserError when the format cannot hold the network, what it needs is not installed, something is there already, or
    what was written differs from the run's network when it is read back; then nothing is left behind.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: no such format; there are {', '.join(FORMATS)}")
    chosen = FORMATS[kind]
    missing = [name for name in chosen.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format {kind} needs {', '.join(missing)}: pip install 'mokd[export]'")
    with held_sources(run, branch, network) as sources:
        if target is not None and len(sources) > 1:
            raise UserError("--out: give one --branch with it")
        for source in sources:
            folder = target or run.path / "export" / f"{source.branch.name}-{network}-{kind}"
            if folder.exists() and not replace:
                raise UserError(f"{folder}: exists already; --force replaces it")
            beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")
            try:
                beside.mkdir(parents=True)
                chosen.write(source, beside)
                (beside / "preprocessing.json").write_text(json.dumps(source.preprocessing(), indent=1) + "\n")
                load = chosen.load(source)
                difference = largest_difference(source, beside, load)
                (beside / "README.md").write_text(card(source, kind, load, difference), encoding="utf-8")
                if folder.exists():
                    shutil.rmtree(folder)
                os.rename(beside, folder)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            yield Export(source.branch.name, network, source.step, kind, str(folder), difference)
