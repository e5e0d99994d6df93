"""A picture of what the networks get: images with the boxes of their views, and the views by the reference loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.beton.samples import Samples
from data_pipeline.config import ViewsConfig
from data_pipeline.loaders.torchvision import change_colours, cut_view
from data_pipeline.sampling.draws import ViewDraws, draw_views, view_sizes

_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_COLOURS = ("#4e9be8", "#ff9a4d", "#3fbf7f", "#c58be0", "#e6cf5a", "#ff6b8b", "#35b5c2", "#b0b8c1")
_ORIGINAL, _SMALLEST, _GAP, _TEXT, _COLUMNS = 320, 96, 12, 20, 5


def view_picture(
    samples: Samples, views: ViewsConfig, seed: int, epoch: int, sample_ids: Sequence[int]
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """The picture, a row per sample, and the draws of every view: box in pixels of the stored image, operations.

    Small images and views are enlarged without smoothing. A damaged image raises DataError.
    """
    rows, facts = [], []
    for sample_id in sample_ids:
        image = samples.image(sample_id).convert("RGB")
        draws = draw_views(views, seed, epoch, [sample_id], [image.width], [image.height])
        described = [_describe(draws, v) for v in range(views.count)]
        facts.append({"sample": sample_id, "width": image.width, "height": image.height, "views": described})
        rows.append(_row(sample_id, image, draws, views))
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet, facts


def _row(sample_id: int, image: Image.Image, draws: ViewDraws, views: ViewsConfig) -> Image.Image:
    """One image with its boxes at the left, its views beside it."""
    scale = _ORIGINAL / max(image.width, image.height)
    smoothing = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    original = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), smoothing)
    pencil, font = ImageDraw.Draw(original), ImageFont.load_default(14)
    tiles = []
    for v, size in enumerate(view_sizes(views).tolist()):
        x, y, w, h = (scale * float(edge) for edge in draws.box[0, v])
        colour = _COLOURS[v % len(_COLOURS)]
        pencil.rectangle((x, y, x + w - 1, y + h - 1), outline=colour, width=2)
        pencil.text((x + 4, y + 2), str(v), fill=colour, font=font, stroke_width=2, stroke_fill="black")
        cut = cut_view(image, draws.box[0, v].tolist(), size, bool(draws.flip[0, v]))
        (view,) = change_colours((cut,), draws, 0, v, views.solarize_threshold)
        tiles.append(view if size >= _SMALLEST else view.resize((_SMALLEST, _SMALLEST), Image.Resampling.NEAREST))
    lines = [tiles[i : i + _COLUMNS] for i in range(0, len(tiles), _COLUMNS)]
    cell = max(tile.width for tile in tiles)
    heights = [max(tile.height for tile in line) + _TEXT + _GAP for line in lines]
    width = _ORIGINAL + 2 * _GAP + _COLUMNS * (cell + _GAP)
    row = Image.new("RGB", (width, max(original.height + _TEXT + 2 * _GAP, sum(heights) + _GAP)), "white")
    row.paste(original, (_GAP, _GAP + _TEXT))
    pencil = ImageDraw.Draw(row)
    pencil.text((_GAP, _GAP), f"sample {sample_id}, {image.width} x {image.height}", fill="black", font=font)
    for v, tile in enumerate(tiles):
        line, column = divmod(v, _COLUMNS)
        left, top = _ORIGINAL + 2 * _GAP + column * (cell + _GAP), _GAP + sum(heights[:line])
        kind = "global" if v < views.global_crops.count else "local"
        pencil.rectangle((left, top + 3, left + 10, top + 13), fill=_COLOURS[v % len(_COLOURS)])
        pencil.text((left + 15, top), f"{v} {kind}", fill="black", font=font)
        row.paste(tile, (left, top + _TEXT))
    return row


def _describe(draws: ViewDraws, v: int) -> dict[str, Any]:
    """The draws of view v of the first sample; only the jitter that is carried out, in its order."""
    jitter = [(_OPERATIONS[o], round(float(draws.factor[0, v, o]), 3)) for o in draws.order[0, v]]
    return {
        "view": v,
        "box": draws.box[0, v].tolist(),
        "flip": bool(draws.flip[0, v]),
        "jitter": dict(jitter) if draws.jitter[0, v] else {},
        "grey": bool(draws.grey[0, v]),
        "blur_radius_px": round(float(draws.blur[0, v]), 3),
        "solarize": bool(draws.solarize[0, v]),
    }
