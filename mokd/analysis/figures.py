"""Drawing: the kinds of panels that the pictures of an analysis are made of.

Shape letters: S side in pixels, G side of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

# apart for the color-blind too (Okabe and Ito, 2008)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#f0e442", "#7a4fa3")
ALONE = "#8a8a8a"


def new_figure(width: float, height: float, *, laid_out: bool = True) -> Any:
    """An empty figure, in inches, which no window system or global state knows of.

    laid_out: its panels are placed so that all labels find room.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "mokd"  # names inside of SVG files follow from what is drawn
    return Figure(figsize=(width, height), layout="constrained" if laid_out else None)


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with so many panels in a row, each of a size in inches."""
    figure = new_figure(width * count, height)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


@dataclass(frozen=True)
class Tile:
    """An image `[S, S, 3]`, with a map `[G, G]` over it, boxes (left, top, side, color) on it, and words above it."""

    image: Tensor
    heat: Tensor | None = None
    boxes: Sequence[tuple[int, int, int, str]] = ()
    words: str = ""
    words_color: str = "#000000"


def sheet(rows: Sequence[Sequence[Tile | None]], names: Sequence[str] = (), tile: float = 1.6) -> Any:
    """A sheet of tiles; `names` stand at the left of the rows. None leaves a place empty.

    A map is drawn from transparent, its smallest value, to opaque, its largest, however little they differ.
    """
    columns = max(len(row) for row in rows)
    lines = max((shown.words.count("\n") + 1 for row in rows for shown in row if shown and shown.words), default=0)
    gap, left, head = 0.06, 0.3 if names else 0.06, 0.15 * lines + 0.06
    width, height = left + columns * (tile + gap), len(rows) * (tile + head) + gap
    figure = new_figure(width, height, laid_out=False)  # a solver would take seconds for hundreds of tiles
    for r, row in enumerate(rows):
        for c, shown in enumerate(row):
            x, y = left + c * (tile + gap), height - (r + 1) * (tile + head)
            one = figure.add_axes((x / width, y / height, tile / width, tile / height))
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
            if c == 0 and r < len(names):
                one.set_ylabel(names[r], fontsize=8, labelpad=3)
            if shown is not None:
                _draw(one, shown)
    return figure


def _draw(axes: Any, tile: Tile) -> None:
    from matplotlib.patches import Rectangle

    side = tile.image.shape[0]
    extent = (0, side, side, 0)
    axes.imshow(tile.image.numpy(), extent=extent, interpolation="nearest")
    if tile.heat is not None:
        heat = tile.heat.float().cpu().numpy()
        share = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-12)
        axes.imshow(np.zeros((1, 1)), extent=extent, cmap="gray", vmin=0, vmax=1, alpha=0.35)
        axes.imshow(share, extent=extent, cmap="inferno", alpha=0.85 * share**0.7, interpolation="nearest")
    for left, top, size, color in tile.boxes:
        axes.add_patch(Rectangle((left, top), size, size, fill=False, edgecolor="black", lw=3.2))
        axes.add_patch(Rectangle((left, top), size, size, fill=False, edgecolor=color, lw=1.8))
    axes.set(xlim=(0, side), ylim=(side, 0))
    if tile.words:
        axes.set_title(tile.words, fontsize=7, color=tile.words_color, pad=2)


def matrix(axes: Any, values: Any, title: str, x: str, y: str) -> Any:
    """A matrix of values from 0 to 1 as colors, the first row at the bottom."""
    picture = axes.imshow(values, origin="lower", aspect="auto", cmap="magma", vmin=0.0, vmax=1.0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return picture
