"""The demo's images: labelled JPEG files that are generated, so that a first run needs no download.

A class is one shape filled with one kind of pattern. Position, size, rotation, colours, contrast, lighting, background,
clutter and noise are drawn anew for every image: neither colour nor single pixels tell the class, shape and pattern do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.core.errors import UserError

Field = NDArray[np.float64]

_SUPERSAMPLE = 2


def generate(
    out: Path,
    *,
    classes: int = 10,
    per_class_train: int = 300,
    per_class_test: int = 50,
    size_px: int = 72,
    seed: int = 0,
) -> None:
    """Writes `out/train/<class>/*.jpg` and `out/test/<class>/*.jpg`, the same files for the same arguments.

    Raises UserError for more classes than there are pairs of a shape and a pattern.
    """
    names = class_names()
    if not 2 <= classes <= len(names):
        raise UserError(f"synthetic images: {classes} classes asked for, expected 2 to {len(names)}")
    jobs = [
        (out / split / names[label], label, split_number, index)
        for split_number, (split, count) in enumerate((("train", per_class_train), ("test", per_class_test)))
        for label in range(classes)
        for index in range(count)
    ]
    for folder in {job[0] for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)

    def work(job: tuple[Path, int, int, int]) -> None:
        folder, label, split_number, index = job
        generator = np.random.default_rng([seed, split_number, label, index])
        pixels = render(label, size_px, generator)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=92)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(work, jobs):
            pass


def class_names() -> list[str]:
    """All classes, in an order in which neighbours differ both in shape and in pattern."""
    return [f"{shape}_{pattern}" for shape, pattern in _classes()]


def render(label: int, size_px: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """One image of a class: uint8 `[size, size, 3]`."""
    shape, pattern = _classes()[label]
    side = size_px * _SUPERSAMPLE
    axis = (np.arange(side) + 0.5) / side * 2.0 - 1.0
    x, y = axis[None, :], axis[:, None]
    image = _background(x, y, generator)
    for _ in range(generator.integers(1, 4)):
        image = _clutter(image, x, y, generator)
    scale = generator.uniform(0.6, 0.9)
    centre = generator.uniform(scale - 1.05, 1.05 - scale, 2)
    u, v = _turned(x - centre[0], y - centre[1], generator.uniform(-0.4, 0.4), scale)
    mask = _SHAPES[shape](u, v)
    colours = _two_colours(generator)
    phase = generator.uniform(0.0, 2.0 * np.pi, 2)
    frequency = generator.uniform(5.0, 7.0)
    fill = _PATTERNS[pattern](u * frequency + phase[0], v * frequency + phase[1]) > 0.0
    inside = np.where(fill[..., None], colours[0], colours[1])
    image = np.where(mask[..., None], inside, image)
    light = 1.0 + generator.uniform(-0.3, 0.3) * x + generator.uniform(-0.3, 0.3) * y
    image = image * light[..., None]
    image = image.reshape(size_px, _SUPERSAMPLE, size_px, _SUPERSAMPLE, 3).mean(axis=(1, 3))
    image += generator.normal(0.0, generator.uniform(2.0, 10.0), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _turned(x: Field, y: Field, angle: float, scale: float) -> tuple[Field, Field]:
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    return cos * x + sin * y, cos * y - sin * x


def _two_colours(generator: np.random.Generator) -> Field:
    """Two colours of clearly different brightness and any hue."""
    colours = generator.uniform(0.3, 1.0, (2, 3))
    dark, bright = generator.uniform(20.0, 90.0), generator.uniform(160.0, 240.0)
    levels = np.array([dark, bright])[generator.permutation(2)]
    return colours / colours.mean(axis=1, keepdims=True).clip(0.2) * levels[:, None]


def _background(x: Field, y: Field, generator: np.random.Generator) -> Field:
    """A smooth mixture of waves in two muted colours: were it vivid, telling images apart would need nothing else."""
    waves = np.zeros((y.shape[0], x.shape[1]))
    for _ in range(5):
        direction = generator.normal(0.0, 4.0, 2)
        waves += np.sin(direction[0] * x + direction[1] * y + generator.uniform(0.0, 2.0 * np.pi))
    part = 1.0 / (1.0 + np.exp(-waves))
    colours = generator.uniform(70.0, 185.0, (2, 1)) + generator.uniform(-25.0, 25.0, (2, 3))
    return part[..., None] * colours[0] + (1.0 - part[..., None]) * colours[1]


def _clutter(image: Field, x: Field, y: Field, generator: np.random.Generator) -> Field:
    """A plain bar or blob that means nothing."""
    centre, scale = generator.uniform(-1.1, 1.1, 2), generator.uniform(0.1, 0.3)
    u, v = _turned(x - centre[0], y - centre[1], generator.uniform(0.0, np.pi), scale)
    mask = u**2 + v**2 < 1.0 if generator.random() < 0.5 else (np.abs(u) < 2.0) & (np.abs(v) < 0.5)
    return np.where(mask[..., None], generator.uniform(60.0, 195.0) + generator.uniform(-25.0, 25.0, 3), image)


def _polygon(u: Field, v: Field, corners: int) -> NDArray[np.bool_]:
    angle = np.arctan2(u, -v)
    sector = 2.0 * np.pi / corners
    folded = np.mod(angle + sector / 2.0, sector) - sector / 2.0
    return np.hypot(u, v) * np.cos(folded) < np.cos(np.pi / corners)


def _star(u: Field, v: Field) -> NDArray[np.bool_]:
    angle = np.arctan2(u, -v)
    return np.hypot(u, v) < 0.65 + 0.4 * np.cos(5.0 * angle)


_SHAPES: dict[str, Callable[[Field, Field], NDArray[np.bool_]]] = {
    "disc": lambda u, v: u**2 + v**2 < 0.85,
    "ring": lambda u, v: (u**2 + v**2 < 1.0) & (u**2 + v**2 > 0.25),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.8,
    "triangle": lambda u, v: _polygon(u, v, 3),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.32) & (np.maximum(np.abs(u), np.abs(v)) < 1.0),
    "star": _star,
    "bar": lambda u, v: (np.abs(u) < 1.0) & (np.abs(v) < 0.42),
    "crescent": lambda u, v: (u**2 + v**2 < 1.0) & ((u - 0.5) ** 2 + v**2 > 0.6),
    "arch": lambda u, v: (np.hypot(u, v) < 1.0) & (np.hypot(u, v) > 0.5) & (v < 0.2),
    "hourglass": lambda u, v: (np.abs(u) < np.abs(v) * 0.9 + 0.1) & (np.abs(v) < 0.95),
}

_PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "stripes": lambda u, v: np.sin(2.0 * v) + 0.0 * u,
    "checks": lambda u, v: np.sin(1.5 * u) * np.sin(1.5 * v),
    "dots": lambda u, v: np.cos(2.0 * u) + np.cos(2.0 * v) - 0.9,
    "posts": lambda u, v: np.sin(2.0 * u) + 0.0 * v,
    "waves": lambda u, v: np.sin(2.0 * v + 1.5 * np.sin(1.5 * u)),
}


def _classes() -> list[tuple[str, str]]:
    shapes, patterns = list(_SHAPES), list(_PATTERNS)
    return [(s, patterns[(i + turn) % len(patterns)]) for turn in range(len(patterns)) for i, s in enumerate(shapes)]
