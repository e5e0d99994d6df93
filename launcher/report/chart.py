"""Curves as inline SVG, drawn for the width of a phone; wider screens get more of them beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float | None]]  # a value that is none (not finite when it was logged) leaves a gap

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_BUCKETS = 180
# lines differ by more than their colour
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
COLOURS = 6


def line_chart(title: str, series: Mapping[str, Points], marks: Sequence[float] = ()) -> str:
    """A figure of curves over the step, with a legend and what a screen reader is to say.

    marks: steps with a vertical line, where a run was resumed.
    """
    values = [y for points in series.values() for _, y in points if y is not None]
    steps = [x for points in series.values() for x, _ in points]
    if not values:
        return ""
    x_ticks, y_ticks = ticks(min(steps), max(steps), 5), ticks(min(values), max(values), 4)
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))

    def x_of(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / ((y_high - y_low) or 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        anchor = "end" if x_of(x) > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{x_of(x):.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{_step(x)}</text>')
    for x in (x for x in marks if x_low <= x <= x_high):
        parts.append(f'<line class="mark" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    legend, words = [], []
    for i, (name, points) in enumerate(series.items()):
        stroke = f'stroke="var(--c{i % COLOURS})" stroke-dasharray="{_DASHES[i % len(_DASHES)]}"'
        for line in _pieces(thinned(points)):
            if len(line) == 1:
                x, y = line[0]
                parts.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5" fill="var(--c{i % COLOURS})"/>')
            else:
                path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
                parts.append(f'<polyline class="series" {stroke} points="{path}"/>')
        known, last = [(x, y) for x, y in points if y is not None], "-"
        if known:
            last = f"{known[-1][1]:.4g}"
            words.append(f"{name} from {known[0][1]:.4g} at step {known[0][0]:g} to {last} at {known[-1][0]:g}")
        swatch = (
            f'<svg viewBox="0 0 26 8" aria-hidden="true"><line class="series" {stroke} x2="26" y1="4" y2="4"/></svg>'
        )
        legend.append(f"<li>{swatch}{escape(name)} <b>{last}</b></li>")
    told = escape(f"{title}: {'; '.join(words)}")
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong>"
        f'<ul class="legend">{"".join(legend)}</ul></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(points: Points) -> Points:
    """The smallest and the largest value of each of some stretches of equal count, so that no peak is lost."""
    size = math.ceil(len(points) / _BUCKETS)
    if size <= 2:
        return points
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        known = [point for point in bucket if point[1] is not None]
        if not known:
            kept.append(bucket[0])
            continue
        ends = {min(known, key=lambda point: point[1] or 0.0), max(known, key=lambda point: point[1] or 0.0)}
        kept += sorted(ends, key=lambda point: point[0])
    return kept


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """The stretches without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            found.append([])
        else:
            found[-1].append((x, y))
    return [piece for piece in found if piece]


def _step(x: float) -> str:
    return f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"
