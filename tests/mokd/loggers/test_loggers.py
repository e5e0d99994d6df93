"""Loggers read back by their own libraries: a run that lost steps and did them again is one curve in each."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.core.errors import UserError
from mokd.config import LoggingConfig
from mokd.loggers.base import Continued, check, open_loggers
from mokd.loggers.prometheus import Prometheus
from mokd.runs.metrics import MetricsWriter, read_metrics
from mokd.runs.run_directory import RunDirectory
from tests.support import tiny_config

STEPS = {step: 10.0 * step for step in range(1, 9)}


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed: pip install 'mokd[{library}]'")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "tiny", tiny_config())


def attempt(run: RunDirectory, config: LoggingConfig, resumed: int, steps: range, *, extras: bool = False) -> None:
    """One attempt that goes on from step `resumed` and logs these steps, as the trainer's reports do."""
    number = run.claim_attempt()
    metrics = MetricsWriter(run, number, resumed)
    dropped = {(int(record["step"]), key) for record in metrics.dropped for key in record}
    loggers = open_loggers(
        config, number, Continued(run, {"a": {"b": 1}, "list": [{"c": 2}]}, resumed, metrics.kept, dropped)
    )
    for step in steps:
        # on a GPU a step that is done again differs by rounding
        record = {
            "step": step,
            "images_seen": 8 * step,
            "images_per_second": 5.0,
            "loss/vit/total": STEPS[step] + number,
        }
        metrics.write(record)
        loggers.scalars(step, {key: value for key, value in record.items() if key != "step"})
    if extras:
        loggers.histogram(steps[-1], "feature_std/vit", np.linspace(0.0, 1.0, 50))
        loggers.picture(steps[-1], "views", Image.new("RGB", (32, 16), "red"), "box, flip")
    # the accuracy of a probe comes after later steps
    late = {"step": steps[0], "eval/vit/linear_top1": 50.0}
    metrics.write(late)
    loggers.scalars(steps[0], {"eval/vit/linear_top1": 50.0})
    loggers.flush()
    loggers.close()
    metrics.close()


def two_attempts(run: RunDirectory, config: LoggingConfig) -> None:
    """The first attempt logs 6 steps, of which the last two are lost; the second does them again and goes on."""
    attempt(run, config, 0, range(1, 7))
    attempt(run, config, 4, range(5, 9), extras=True)


def test_tensorboard_is_one_curve_with_histograms_and_pictures(run: RunDirectory) -> None:
    two_attempts(run, LoggingConfig())
    board = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    losses = [(event.step, event.value) for event in board.Scalars("loss/vit/total")]
    assert losses == [(step, value + (1 if step <= 4 else 2)) for step, value in STEPS.items()]
    (histogram,) = board.Histograms("feature_std/vit")
    assert (histogram.step, histogram.histogram_value.num) == (8, 50)
    (picture,) = board.Images("views")
    assert (picture.step, picture.width, picture.height) == (8, 32, 16)
    assert b"box, flip" in board.Tensors("views/text_summary")[0].tensor_proto.string_val[0]


@needs("mlflow")
def test_mlflow_is_one_curve(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_attempts(run, LoggingConfig(loggers=("mlflow",)))
    client = MlflowClient(tracking_uri=f"sqlite:///{run.path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("mokd").experiment_id])
    assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
    assert found.data.params == {"a.b": "1", "list.0.c": "2"}
    history = client.get_metric_history(found.info.run_id, "loss/vit/total")
    assert sorted((m.step, m.value) for m in history) == [(s, v + (1 if s <= 6 else 2)) for s, v in STEPS.items()]
    assert [m.step for m in client.get_metric_history(found.info.run_id, "eval/vit/linear_top1")] == [1, 5]


@needs("mlflow")
def test_a_logger_that_comes_later_gets_the_curve_so_far_and_a_rewound_run_a_new_one(run: RunDirectory) -> None:
    from mlflow.tracking import MlflowClient

    attempt(run, LoggingConfig(), 0, range(1, 5))
    config = LoggingConfig(loggers=("mlflow",))
    attempt(run, config, 4, range(5, 7))
    run.loggers_file.unlink()  # as rewinding does
    attempt(run, config, 2, range(3, 5))
    client = MlflowClient(tracking_uri=f"sqlite:///{run.path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("mokd").experiment_id])
    curves = [sorted(m.step for m in client.get_metric_history(r.info.run_id, "loss/vit/total")) for r in runs]
    assert sorted(curves) == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]


@needs("wandb")
def test_wandb_is_one_run_with_every_step_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    two_attempts(run, LoggingConfig(loggers=("wandb",)))
    parts = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 2
    values: list[tuple[int, float]] = []
    names = set()
    for part in parts:
        for record in wandb_records(part):
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.display_name, record.run.project))
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "loss/vit/total" in items:
                values.append((items["step"], items["loss/vit/total"]))
    assert len(names) == 1
    assert next(iter(names))[1:] == ("tiny", "mokd")
    assert values == [(step, value + (1 if step <= 6 else 2)) for step, value in STEPS.items()]
    assert list(run.path.glob("wandb/offline-run-*/files/media/images/views_*.png"))


def wandb_records(path: Path) -> Iterator[Any]:
    """What lies in a file of wandb: its own messages, in blocks of LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_a_library_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match=r"logging.loggers: wandb is not installed; pip install 'mokd\[wandb\]'"):
        check(LoggingConfig(loggers=("tensorboard", "wandb")))
    check(LoggingConfig(loggers=("tensorboard",)))


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(
    run: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.tensorboard.write_text("a file where the directory should be")
    config = LoggingConfig(prometheus=tmp_path / "node" / "mokd.prom")
    with caplog.at_level(logging.WARNING):
        attempt(run, config, 0, range(1, 3))
    assert caplog.text.count("TensorBoard cannot be written (File exists)") == 1
    assert "mokd_step" in (tmp_path / "node" / "mokd.prom").read_text()
    assert [record["step"] for record in read_metrics(run.metrics_file)] == [1, 2, 1]


def test_tensorboard_false_leaves_it_out() -> None:
    assert LoggingConfig(tensorboard=False, loggers=("tensorboard", "mlflow")).chosen == ("mlflow",)
    assert LoggingConfig(loggers=("mlflow", "tensorboard", "mlflow")).chosen == ("mlflow", "tensorboard")


def test_the_textfile_has_every_number_with_its_labels(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    file = tmp_path / "mokd.prom"
    run.claim_attempt({"time": 1000.0})
    run.phases_file(1).parent.mkdir()
    run.phases_file(1).write_text(json.dumps({"time": 1020.0, "phase": "step", "step": 4}) + "\n")
    second = run.claim_attempt({"time": 2000.0})
    monkeypatch.setattr("mokd.loggers.prometheus.time.time", lambda: 2010.0)
    kept = [{"step": 4, "images_seen": 40, "images_per_second": 5.0}]  # 8 of the 20 s of the first attempt
    logger = Prometheus(file, second, Continued(run, {}, 4, kept))
    values = {
        "images_seen": 60,
        "images_per_second": 4.0,
        "data_wait_fraction": 0.25,
        "alarms": 2,
        "loss/vit/total": 1.0,
    }
    logger.scalars(6, values)
    logger.scalars(6, {"eval/vit/knn_top1": 50.0})  # no word of training
    found = dict(line.rsplit(" ", 1) for line in file.read_text().splitlines() if not line.startswith("#"))
    labels = '{run="tiny",job_id="4711"}'
    expected = {"step": 6, "images_per_second": 4, "data_wait_fraction": 0.25, "alarms": 2, "restarts_total": 1}
    expected |= {"goodput_ratio": (8.0 + 5.0) / 30.0, "logged_timestamp_seconds": 2010}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {f"mokd_{name}{labels}": value for name, value in expected.items()}
    )
    types = [line.split()[2:] for line in file.read_text().splitlines() if line.startswith("# TYPE")]
    assert ["mokd_restarts_total", "counter"] in types
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["mokd.prom"]
    assert file.stat().st_mode & 0o777 == 0o644
