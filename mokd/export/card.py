"""The model card of an export: what it is, how to read it, what it was made from, what was measured."""

from __future__ import annotations

import json

import mokd
from mokd.evaluation import results
from mokd.export.source import Source
from mokd.runs import first_weights


def card(source: Source, kind: str, load: str, difference: float) -> str:
    """A README in Markdown."""
    config, branch = source.config, source.branch
    together = [other.name for other in config.branches if other is not branch]
    company = f"together with {', '.join(together)}" if together else "alone"
    steps = f"step {source.step:,}, batch {config.optim.global_batch}, schedule of {config.optim.epochs} epochs"
    facts = {
        "network": f"{branch.backbone}, the {source.network} of branch {branch.name}",
        "feature": f"{source.backbone.width} numbers per image",
        "trained": f"not here: frozen, {company}"
        if branch.frozen
        else f"without labels, objective {config.objective.kind}, {company}; {steps}",
        "data": config.data.train.name,
        "first weights": first_weights.words(source.run, branch),
        "made by": f"mokd {mokd.__version__}, run {config.name}, seed {config.seed}",
        "checked": f"read back in a clean process: features differ by {difference:.1e} of the largest one at most",
    }
    lines = [f"# {config.name}: {branch.name} ({kind})", ""]
    lines += [f"* {name}: {text}" for name, text in facts.items()]
    preparation = json.dumps(source.preprocessing())
    lines += ["", "Images are prepared so:", "", "```json", preparation, "```", "", "In this folder, with `images` a"]
    lines += [
        f"normalised float32 array `[B, {source.backbone.channels}, S, S]`:",
        "",
        "```python",
        load.rstrip(),
        "```",
        "",
        *_measured(source),
    ]
    if branch.init:
        own = (first_weights.facts_of(source.run, branch) or {}).get("license")
        named = f" ({own})" if own else ""
        lines += ["", f"The weights it started from have a licence of their own{named}, which goes on to hold."]
    return "\n".join(lines).rstrip() + "\n"


def _measured(source: Source) -> list[str]:
    """What `mokd eval` has found for this network at this step; the best setting of every task."""
    rows = []
    for path in sorted(source.run.evaluations.glob(f"*-{source.network}-step-{source.step}.json")):
        evaluation = results.find(path)
        record = evaluation.record(source.branch.name) if evaluation else None
        if evaluation is not None and record is not None:
            setting = results.SETTINGS[evaluation.task]
            rows.append(
                f"| {evaluation.task} ({setting} {record[setting]:g}) | {evaluation.images} of "
                f"{evaluation.test.rpartition('/')[2]} | {record['top1']:.2f} |"
            )
    if not rows:
        return ["Not evaluated at this step (`mokd eval`)."]
    return ["| measured | test images | top-1 (%) |", "|---|---|---|", *rows]
