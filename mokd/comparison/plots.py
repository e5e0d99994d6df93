"""A comparison as a picture: accuracies with their intervals, and the k-NN curves of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mokd.comparison.gain import BranchGain, Comparison, MethodGain

_METHODS, _SOLO = ("#1b6ca8", "#c8641b", "#4a8f3c", "#7a4fa3"), "#9a9a9a"
_BAR = 0.38


def plot(comparison: Comparison, path: Path) -> None:
    """Draws bars for every branch and method, then a panel of curves for every branch that has some."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = comparison.methods
    branches = list(dict.fromkeys(name for method in methods for name in method.branches))
    drawn = [name for name in branches if any(_has_curves(m.branches.get(name)) for m in methods)]
    widths = [max(3.2, 1.1 * sum(len(m.branches) for m in methods)), *[3.8] * len(drawn)]
    figure, panels = pyplot.subplots(
        1, len(widths), figsize=(sum(widths), 4.4), layout="constrained", width_ratios=widths, squeeze=False
    )
    _bars(panels[0, 0], comparison, branches)
    for axes, branch in zip(panels[0, 1:], drawn, strict=True):
        _curves(axes, methods, branch)
    entries: dict[str, Any] = {}
    for axes in panels[0, ::-1]:  # a line tells more than a bar of the same name
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", lw=0.4, alpha=0.5)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Any, comparison: Comparison, branches: Sequence[str]) -> None:
    """Alone and together side by side, a group for every branch and method; the gain above."""
    places, names, highest = [], [], 0.0
    place = 0.0
    for branch in branches:
        for number, method in enumerate(comparison.methods):
            if branch not in method.branches:
                continue
            gain = method.branches[branch].gain
            _bar(axes, place - 0.5 * _BAR, gain.solo, gain.solo_ci95, _SOLO, "alone")
            _bar(axes, place + 0.5 * _BAR, gain.pair, gain.pair_ci95, _colour(number), f"together ({method.label})")
            top = max(gain.solo_ci95[1], gain.pair_ci95[1])
            text = f"{gain.gain:+.1f}\n[{gain.gain_ci95[0]:+.1f}, {gain.gain_ci95[1]:+.1f}]"
            axes.annotate(text, (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=8)
            highest = max(highest, top)
            places.append(place)
            names.append(branch)
            place += 1.0
        place += 0.25
    axes.set_xticks(places, names, fontsize=9)
    axes.set_ylim(0.0, 1.18 * highest)
    axes.set_ylabel(f"top-1 of the {comparison.network} (%)")
    title = f"{comparison.title_with_setting}\n{comparison.images:,} test images, 95% intervals"
    axes.set_title(title, fontsize=10, loc="left")


def _bar(axes: Any, place: float, value: float, interval: tuple[float, float], colour: str, label: str) -> None:
    bar = axes.bar(place, value, 0.94 * _BAR, color=colour, label=label)
    # a percentile interval need not hold the value
    errors = [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]
    axes.errorbar(place, value, errors, fmt="none", ecolor="#202020", elinewidth=1, capsize=2)
    axes.bar_label(bar, fmt="%.1f", label_type="center", color="white", fontsize=9)


def _curves(axes: Any, methods: Sequence[MethodGain], branch: str) -> None:
    """k-NN while training: every run thin where there are several, their mean thick."""
    solo_drawn: list[dict[int, Any]] = []
    for number, method in enumerate(methods):
        found = method.branches.get(branch)
        if not _has_curves(found):
            continue
        assert found is not None
        _curve(axes, found.pair_curves, _colour(number), f"together ({method.label})", "-")
        if found.solo_curves not in solo_drawn:  # methods may share a baseline
            label = "alone" if not solo_drawn else f"alone ({method.label})"
            _curve(axes, found.solo_curves, _SOLO, label, ("--", ":", "-.")[len(solo_drawn) % 3])
            solo_drawn.append(found.solo_curves)
    axes.set_title(f"{branch}: k-NN while training", fontsize=10, loc="left")
    axes.set_xlabel("step")
    ks = {found.curve_k for method in methods if (found := method.branches.get(branch)) is not None}
    k = ks.pop() if len(ks) == 1 else None
    axes.set_ylabel("top-1 (%), best k" if k is None else f"top-1 (%), k {k}")


def _curve(axes: Any, by_seed: dict[int, Any], colour: str, label: str, style: str) -> None:
    curves = [curve for curve in by_seed.values() if curve]
    if not curves:
        return
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), style, color=colour, lw=0.8, alpha=0.5)
    shared = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    means = [sum(dict(curve)[step] for curve in curves) / len(curves) for step in shared]
    axes.plot(shared, means, style, color=colour, lw=2.0, marker="o", ms=3.5, label=label)


def _has_curves(found: BranchGain | None) -> bool:
    return found is not None and any([*found.pair_curves.values(), *found.solo_curves.values()])


def _colour(number: int) -> str:
    return _METHODS[number % len(_METHODS)]
