"""Grey images, archives, tables and lists, from their source through both loaders, training and evaluation."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.config import DataConfig
from data_pipeline.loaders.build import build_loader
from mokd.config import RunConfig
from mokd.distributed.local_ranks import train_locally
from mokd.evaluation.entry import evaluate
from mokd.evaluation.request import Request
from mokd.runs.exit_codes import EXIT_DONE
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:data.workers", "ignore:evaluation. .* has the images of")

GREY: dict[str, Any] = {
    "data__channels": 1,
    "views__mean": [0.5],
    "views__std": [0.25],
    "views__jitter": {"saturation": 0.0, "hue": 0.0},
    "views__grey_probability": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 smooth JPEGs in two classes, a dark and a bright one."""
    made, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(48):
        coarse = generator.integers(130 * (i % 2), 120 + 130 * (i % 2), (5, 5, 3), dtype=np.uint8)
        path = made / f"class_{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(path, quality=92)
    return made


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.jpg"))


def as_folder(folder: Path, out: Path) -> Path:
    return folder


def as_archive(folder: Path, out: Path) -> Path:
    with tarfile.open(out.with_suffix(".tar"), "w") as tar:
        for path in pictures(folder):
            for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.cls", path.parent.name.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.with_suffix(".tar")


def as_table(folder: Path, out: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["class_0", "class_1"]}}
    known = {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}
    images = pa.array([{"bytes": path.read_bytes(), "path": None} for path in pictures(folder)])
    labels = pa.array([int(path.parent.name[-1]) for path in pictures(folder)], pa.int64())
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(known)
    pyarrow.parquet.write_table(table, out.with_suffix(".parquet"))
    return out.with_suffix(".parquet")


def as_list(folder: Path, out: Path) -> Path:
    lines = [f"{path},{path.parent.name}\n" for path in pictures(folder)]
    out.with_suffix(".csv").write_text("path,label\n" + "".join(lines))
    return out.with_suffix(".csv")


def views(config: RunConfig, backend: str) -> torch.Tensor:
    """All global views of an epoch `[V, N, C, S, S]`, by sample, without what is drawn but for boxes and flips."""
    still = config.views.jitter.model_copy(update={"probability": 0.0})
    none = {"blur_probability": (0.0,), "solarize_probability": (0.0,)}
    crops = {key: getattr(config.views, key).model_copy(update=none) for key in ("global_crops", "local_crops")}
    plain = config.views.model_copy(update={"jitter": still, "grey_probability": 0.0, **crops})
    data = DataConfig(train=config.data.train, backend=backend, workers=1, channels=config.data.channels)  # type: ignore[arg-type]
    loader = build_loader(data, plain, seed=3, rank=0, world_size=1, global_batch=8)
    batches = list(loader.epoch(0))
    loader.close()
    order = torch.cat([batch.sample_ids for batch in batches]).argsort()
    return torch.cat([batch.views[0] for batch in batches], dim=1)[:, order]


@pytest.mark.parametrize(
    ("source", "changes", "trained"),
    [
        (as_folder, GREY, ("ffcv", "torchvision")),
        (as_archive, {}, ("torchvision",)),
        (as_table, {}, ("ffcv",)),
        (as_list, {}, ("torchvision",)),
    ],
    ids=["grey", "tar", "parquet", "list"],
)
def test_from_the_source_to_an_evaluation_by_both_loaders(
    source: Callable[[Path, Path], Path],
    changes: dict[str, Any],
    trained: tuple[str, ...],
    folder: Path,
    tmp_path: Path,
) -> None:
    beton = tmp_path / "train.beton"
    channels = changes.get("data__channels", 3)
    report = convert([source(folder, tmp_path / "source")], beton, ConvertOptions(channels=channels))
    assert (report.written, report.skipped, report.unlabelled) == (48, (), 0)
    assert report.classes == ("class_0", "class_1")
    known = {"train": str(beton), "test": str(beton), "resize_px": 36, "crop_px": 32, "every_epochs": 1}
    found = []
    for backend in ("ffcv", "torchvision"):
        config = tiny_config(
            beton,
            name=backend,
            data__backend=backend,
            optim__max_steps=1,
            evaluation={**known, "knn": {"k": [5]}},
            **changes,
        )
        found.append(views(config, backend))
        if backend not in trained:
            continue
        run = RunDirectory.create(tmp_path / backend, config)
        assert train_locally(run.path, 1) == EXIT_DONE
        assert any("eval/vit/knn_top1" in record for record in read_metrics(run.metrics_file))
        evaluation, status = evaluate(Request(run.path), 1)
        assert status == EXIT_DONE
        assert evaluation is not None
        assert max(result["top1"] for result in evaluation.results) > 90.0
    assert found[0].shape == (2, 48, channels, 32, 32)
    grey_levels = (found[0] - found[1]).abs().mean(dim=(2, 3, 4)) * 255 * 0.25
    assert grey_levels.max() < 2.0
