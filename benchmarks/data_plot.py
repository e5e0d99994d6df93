"""The data benchmark as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_GROUPS = (
    ("400 px, crops only", "ours_crops_400", "reference_crops_400"),
    ("400 px, everything on the CPU", "ours_full_400", "reference_full_400"),
    ("originals, crops only", "ours_crops_original", "reference_crops_original"),
    ("originals, everything on the CPU", "ours_full_original", "reference_full_original"),
    ("conversion of originals", "convert_original", "convert_ffcv_writer"),
)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws images per second, ours and theirs, with the spread over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates, spread, cores = result["images_per_second"], result["spread"], result["machine"]["cores"]
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    for side, (label, colour) in enumerate((("mokd", "#1b6ca8"), ("torchvision + Pillow / FFCV's writer", "#b0b0b0"))):
        for row, (_, *names) in enumerate(_GROUPS):
            name = names[side]
            low, high = spread[name]
            value, y = rates[name], row + (side - 0.5) * 0.38
            errors = [[value - low], [high - value]]
            legend = label if row == 0 else None
            axes.barh(y, value, 0.36, color=colour, xerr=errors, error_kw={"lw": 0.8}, label=legend)
            axes.annotate(f" {value:,.0f}", (high, y), va="center", fontsize=8)
    axes.axvline(1e3 / result["floor"]["ms_per_image"], color="#c0392b", lw=1, ls="--", label="floor, 400 px crops")
    axes.set_yticks(range(len(_GROUPS)), [name for name, *_ in _GROUPS])
    axes.invert_yaxis()
    axes.set_xlabel(f"images per second ({result['views']} views, {cores} cores), median and range of the rounds")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
