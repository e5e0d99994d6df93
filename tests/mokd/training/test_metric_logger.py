"""What the loop and the thread that saves write at the same time."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from mokd.distributed.process_group import Ranks
from mokd.distributed.stopping import StopRequest
from mokd.monitoring.monitors import Pending
from mokd.runs.files import replace_json
from mokd.runs.heartbeat import Heartbeat
from mokd.runs.metrics import read_metrics
from mokd.runs.run_directory import RunDirectory
from mokd.training.metric_logger import MetricLogger, _Pending
from tests.support import tiny_config


def test_a_logged_step_is_written_once_by_whichever_thread(tmp_path: Path) -> None:
    config = tiny_config()
    run = RunDirectory.create(tmp_path / "run", config)
    attempt = run.claim_attempt()
    heartbeat = Heartbeat(run, attempt, 0)
    logger = MetricLogger(run, attempt, config, Ranks(), torch.device("cpu"), 5, 1000, 0, StopRequest(), heartbeat)
    steps, enough, failures = 200, threading.Event(), []

    def save() -> None:
        try:
            while not enough.is_set():
                logger.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, steps + 1):
        values = {"step": step, "epoch": 0, "images_per_second": 1.0}
        numbers = {f"loss/{branch.name}/total": torch.ones((), dtype=torch.float64) for branch in config.branches}
        logger._pending = _Pending(step, values, Pending(numbers, torch.zeros(1, 2), {}, {}))
        logger._write_pending()
    enough.set()
    for thread in threads:
        thread.join()
    logger.close()
    heartbeat.close()
    assert failures == []
    assert [record["step"] for record in read_metrics(run.metrics_file)] == list(range(1, steps + 1))
    assert run.read_status()["state"] == "running"


def test_threads_of_one_process_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for i in range(300):
                replace_json(tmp_path / "status.json", {"i": i})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
