"""Training and evaluation on images of other than three channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.core.errors import UserError
from mokd.distributed.local_ranks import train_locally
from mokd.evaluation.entry import evaluate
from mokd.evaluation.request import Request
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config

NO_COLOURS: dict[str, Any] = {"views__jitter": {"saturation": 0.0, "hue": 0.0}, "views__grey_probability": 0.0}
FOUR: dict[str, Any] = {
    "data__channels": 4,
    "views__mean": [0.3, 0.3, 0.3, 0.6],
    "views__std": [0.2, 0.2, 0.2, 0.3],
    **NO_COLOURS,
}


@pytest.fixture(scope="module")
def spectral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in the fourth channel alone, as a folder and a beton."""
    folder = tmp_path_factory.mktemp("spectral")
    generator = np.random.default_rng(0)
    for i in range(48):
        values = generator.integers(0, 40000, (40, 40, 4), dtype=np.uint16)
        values[..., 3] = values[..., 3] // 4 + 45000 * (i % 2)
        path = folder / "images" / f"class_{i % 2}" / f"{i:02d}.npy"
        path.parent.mkdir(exist_ok=True, parents=True)
        np.save(path, values)
    convert([folder / "images"], folder / "train.beton", ConvertOptions(channels=4))
    return folder


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_train_and_evaluate_on_four_channels(spectral: Path, tmp_path: Path, backend: str) -> None:
    beton = spectral / "train.beton"
    known = {"train": str(beton), "test": str(beton), "resize_px": 36, "crop_px": 32, "every_epochs": 1}
    config = tiny_config(
        beton if backend == "ffcv" else spectral / "images",
        data__backend=backend,
        optim__max_steps=2,
        evaluation={**known, "knn": {"k": [5]}},
        **FOUR,
    )
    run = RunDirectory.create(tmp_path / "run", config)
    assert train_locally(run.path, 1) == EXIT_DONE
    records = read_metrics(run.metrics_file)
    assert any("eval/vit/knn_top1" in record for record in records)
    for task in ("knn", "semi"):
        overrides = ("evaluation.semi.epochs=1", "evaluation.semi.batch=16", "evaluation.semi.fractions=[1.0]")
        evaluation, status = evaluate(Request(run.path, task, overrides=overrides), 1)
        assert status == EXIT_DONE
        assert evaluation is not None
        if task == "knn":  # the fourth channel is read: without it there is nothing to tell them apart
            assert max(result["top1"] for result in evaluation.results) > 90.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__channels": 4}, r"views.mean has 3 entries, data.channels is 4.*convert --statistics .* --channels 4"),
        ({**FOUR, "views__grey_probability": 0.2}, "views.grey_probability: expected 0, colours have no meaning for 4"),
        ({**FOUR, "views__jitter": {}}, "views.jitter.saturation, views.jitter.hue: expected 0"),
        ({**FOUR, "views__std": [0.2]}, "mean has 4 entries, std 1"),
        ({"data__channels": 0}, "greater than or equal to 1"),
        ({"data__channels": 65}, "less than or equal to 64"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)
