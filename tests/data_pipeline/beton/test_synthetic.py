from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.beton.synthetic import class_names, generate
from data_pipeline.core.errors import UserError


def digest(folder: Path) -> str:
    files = sorted(folder.rglob("*.jpg"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_deterministic(tmp_path):
    for name in ("a", "b", "c"):
        generate(tmp_path / name, per_class_train=2, per_class_test=1, seed=1 if name == "c" else 0)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert len(list((tmp_path / "a" / "train").iterdir())) == 10
    assert len(set(class_names())) == len(class_names()) >= 10


def test_pixels_do_not_tell_the_class(tmp_path):
    generate(tmp_path, per_class_train=150, per_class_test=20)
    (train, labels), (test, truth) = (load(tmp_path / split) for split in ("train", "test"))
    distance = (train**2).sum(1)[None] - 2 * test @ train.T
    near = labels[np.argsort(distance, axis=1)[:, :10]]
    found = np.array([np.bincount(row, minlength=10).argmax() for row in near])
    assert (found == truth).mean() < 0.5


def load(folder: Path):
    files = [(label, file) for label, sub in enumerate(sorted(folder.iterdir())) for file in sorted(sub.iterdir())]
    pixels = [np.asarray(Image.open(file).resize((32, 32))).reshape(-1) / 255.0 for _, file in files]
    return np.array(pixels), np.array([label for label, _ in files])


def test_too_many_classes(tmp_path):
    with pytest.raises(UserError, match="classes asked for"):
        generate(tmp_path, classes=1000)
