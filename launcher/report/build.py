"""The report: one or several runs as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from launcher.report.chart import Points, line_chart
from launcher.report.gains import gains, opened
from launcher.report.html import page, table
from launcher.report.summary import COLUMNS, summary
from launcher.report.timeline import timeline
from launcher.runs.goodput import goodput
from launcher.slurm.status import find_runs
from mokd.runs import first_weights
from mokd.runs.files import read_json
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory

_PICTURE_BYTES = 8_000_000  # of all pictures of a run: a report is to be sent by mail
_NO_CURVES = frozenset({"step", "epoch", "images_seen", "data_wait_rank", "slow_rank"})
_TITLES = {
    "images_per_second": "Images per second",
    "data_wait_fraction": "Part of the time that the slowest rank waited for data",
    "slow_rank_excess": "How much longer the slowest rank works by itself (part of a step)",
    "alarms": "Alarms that hold",
    "target_kl": "KL between the mean targets of logged steps (nats)",
    "prototypes_in_use": "Prototypes in use",
    "center_change": "Relative change of the center",
    "gradient_norm": "Norm of the gradients, before clipping",
    "update_ratio": "Length of an update over that of the weights",
    "cross_to_self": "Cross over self terms, as they weigh in the loss",
    "agreement": "Similarity of the branches' features (linear CKA)",
    "lr": "Learning rate",
    "eval": "k-NN and other accuracies while training (%)",
    "teacher_entropy": "Entropy of the teacher (nats)",
    "center_norm": "Norm of the center",
    "feature_std": "Standard deviation of the features",
    "feature_rank": "Effective rank of the features",
}


def build_report(runs: Sequence[RunDirectory]) -> str:
    """The page. Raises UserError when a configuration cannot be read."""
    names = [run.path.name for run in runs]
    title = f"Run {names[0]}" if len(runs) == 1 else "Runs " + ", ".join(names)
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    folders = {run.path.absolute().parent for run in runs}
    known = opened(dict.fromkeys(run.path for one in [runs, *map(find_runs, folders)] for run in one))
    lines = [summary(run, known).cells() for run in runs]
    links = [f"#run-{i}" for i in range(len(runs))]
    body = f'<header><h1>{escape(title)}</h1><p class="quiet">As of {now}.</p></header><main>'
    body += table("State of the runs" if len(runs) > 1 else "State of the run", COLUMNS, lines, links)
    if len(runs) > 1:
        body += _side_by_side(runs)
    body += gains([one for one in known if one.path in {run.path for run in runs}], known)
    return page(title, body + "".join(_run(i, run) for i, run in enumerate(runs)) + "</main>")


def _run(number: int, run: RunDirectory) -> str:
    config, account = run.config(), goodput(run)
    marks = [float(attempt.first_step) for attempt in account.attempts[1:]]
    networks = []
    for b in config.branches:
        learns_by = "frozen" if b.frozen else b.own_optimizer.kind
        networks.append([b.name, b.backbone, f"{b.weight:g}", learns_by, first_weights.words(run, b)])
    parts = [
        f'<section id="run-{number}" aria-labelledby="run-{number}-name">'
        f'<h2 id="run-{number}-name">{escape(run.path.name)}</h2>',
        f"<p>{escape(config.objective.kind)}, {config.optim.epochs} epochs, {config.optim.global_batch} images a step, "
        f"seed {config.seed}.</p>",
        table("Branches", ["branch", "backbone", "weight", "optimizer", "first weights"], networks),
        _alarms(run),
        f"<h3>Where the time went</h3>{timeline(run, account)}",
        f"<h3>Curves</h3>{_curves(read_metrics(run.metrics_file), marks)}",
        _evaluations(run),
        _changes(run),
        _pictures(run),
        _environment(run),
        f"<h3>Configuration</h3><details><summary>Every key, with defaults</summary>"
        f'<pre tabindex="0">{escape(run.config_file.read_text(encoding="utf-8"))}</pre></details></section>',
    ]
    return "\n".join(part for part in parts if part)


def families(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Points]]:
    """The curves of each chart by name: a loss per branch, everything else by the first part of its key."""
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for record in records:
        for key, value in record.items():
            if key in _NO_CURVES or not isinstance(value, int | float | None) or "step" not in record:
                continue
            family, _, rest = key.partition("/")
            if family == "loss":
                branch, _, rest = rest.partition("/")
                family = f"Loss of {branch}"
            points = found.setdefault(family, {}).setdefault(rest or family.replace("_", " "), [])
            points.append((record["step"], value))
    return {family: dict(series) for family, series in found.items()}


def _curves(records: Sequence[dict[str, Any]], marks: Sequence[float]) -> str:
    charts = families(records)
    if not charts:
        return "<p>Nothing has been logged yet.</p>"
    # accuracies first, then losses, then how fast, then the rest as it was logged
    first = ["eval", *(name for name in charts if name.startswith("Loss")), "images_per_second", "data_wait_fraction"]
    order = [name for name in dict.fromkeys([*first, *charts]) if name in charts]
    drawn = "".join(line_chart(_TITLES.get(n, n.replace("_", " ").capitalize()), charts[n], marks) for n in order)
    note = '<p class="quiet">Over the step. Dotted vertical lines: the run was resumed there.</p>' if marks else ""
    return f'{note}<div class="grid">{drawn}</div>'


def _side_by_side(runs: Sequence[RunDirectory]) -> str:
    """The accuracies and total losses of all runs in the same charts."""
    charts: dict[str, dict[str, Points]] = {"k-NN accuracy (%)": {}, "Total loss": {}, "Images per second": {}}
    for run in runs:
        for family, series in families(read_metrics(run.metrics_file)).items():
            for name, points in series.items():
                if family == "eval" and name.endswith("/knn_top1"):
                    charts["k-NN accuracy (%)"][f"{run.path.name}: {name.removesuffix('/knn_top1')}"] = points
                elif family.startswith("Loss of ") and name == "total":
                    charts["Total loss"][f"{run.path.name}: {family.removeprefix('Loss of ')}"] = points
                elif family == "images_per_second":
                    charts["Images per second"][run.path.name] = points
    drawn = "".join(line_chart(title, series) for title, series in charts.items())
    return f'<h2>Side by side</h2><div class="grid">{drawn}</div>'


def _evaluations(run: RunDirectory) -> str:
    rows = []
    for path in sorted(run.evaluations.glob("*.json")):
        document = read_json(path)
        if not isinstance(document, dict):
            continue
        for record in document.get("results", []):
            if record.get("headline"):
                about = [str(document.get(key, "-")) for key in ("task", "network", "step", "images")]
                rows.append([record["branch"], *about, *(f"{record[key]:.2f}" for key in ("top1", "top5"))])
    if not rows:
        return ""
    columns = ["branch", "task", "network", "step", "test images", "top-1 %", "top-5 %"]
    return "<h3>Evaluations</h3>" + table("Results of mokd eval, the headline setting of each", columns, rows)


def _changes(run: RunDirectory) -> str:
    lines = _lines(run.changes_file, "Hyper-parameters changed on the way", ["step", "key", "before", "after"])
    return f"<h3>Changes</h3>{lines}" if lines else ""


def _alarms(run: RunDirectory) -> str:
    if not run.alarms_file.exists():
        return ""
    lines = _lines(run.alarms_file, "What the monitors warned of", ["step", "alarm", "advice"])
    return f"<h3>Alarms</h3>{lines or '<p>None.</p>'}"


def _lines(path: Path, caption: str, keys: list[str]) -> str:
    """The lines of a file of a run, by their keys; empty where there are none."""
    rows = [[str(line.get(key, "-")) for key in keys] for line in read_metrics(path)]
    return table(caption, keys, rows) if rows else ""


def _pictures(run: RunDirectory) -> str:
    """The pictures in RUN/analysis and its folders, as far as they fit; what does not is named."""
    parts, left, folder = [], _PICTURE_BYTES, run.path / "analysis"
    for path in sorted(folder.rglob("*.png"), key=lambda path: (path.parent, path.name)):
        if any(name.startswith(".") for name in path.relative_to(folder).parts):
            continue  # half written
        if path.parent != folder and f"<h4>{escape(path.parent.name)}</h4>" not in parts:
            parts.append(f"<h4>{escape(path.parent.name)}</h4>")
        content, name = path.read_bytes(), escape(path.stem.replace("_", " ").replace("-", " "))
        if len(content) > left:
            place = escape(str(path.relative_to(run.path)))
            parts.append(f"<figure><figcaption>{name}: too large for this file; it is {place}</figcaption></figure>")
            continue
        left -= len(content)
        # mokd analyze says beside a picture what is to be seen on it
        beside = read_json(path.with_suffix(".json"))
        said = str(beside["alt"]) if isinstance(beside, dict) and "alt" in beside else ""
        words = f" <span>{escape(said)}</span>" if said else ""
        data = base64.b64encode(content).decode()
        parts.append(
            f'<figure><figcaption><strong>{name}</strong>{words}</figcaption><img alt="'
            f'{escape(said) or f"{name} of run {escape(run.path.name)}"}" src="data:image/png;base64,{data}"></figure>'
        )
    return f"<h3>Pictures</h3>{''.join(parts)}" if parts else ""


def _environment(run: RunDirectory) -> str:
    facts = read_json(run.environment_file)
    if not isinstance(facts, dict):
        return ""
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += [[f"{key}: {name}", str(inner if inner is not None else "-")] for name, inner in value.items()]
        else:
            rows.append([key, " ".join(map(str, value)) if isinstance(value, list) else str(value)])
    return "<h3>Environment</h3>" + table("Of the newest attempt", ["what", "value"], rows)
