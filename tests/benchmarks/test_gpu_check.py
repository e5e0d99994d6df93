"""The logic of `make gpu-check`, on the CPU and on little: every part runs and says what it promises."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import parallel, parallel_rank, run, setting, switches
from benchmarks.gpu_check.record import Record
from benchmarks.gpu_check.run import SECONDS, check, in_process, measure_of
from benchmarks.gpu_check.setting import Setting
from data_pipeline.core.errors import DataError
from data_pipeline.core.schema import dump_yaml
from tests.support import tiny_config

CPU = torch.device("cpu")
TINY = Setting.on(tiny_config(), CPU)
ONE = replace(TINY, batches=(2,))


def figures_of(part: str, setting: Setting = ONE) -> dict[str, Any]:
    figures = dict(measure_of(part)(setting))
    json.dumps(figures)  # they can be recorded
    return figures


def test_all_parts_take_ten_minutes_at_most() -> None:
    assert sum(SECONDS.values()) <= 600


def test_kernels() -> None:
    errors = figures_of("kernels")
    assert errors.keys() == {"fp32", "bf16", "fp16"}
    assert max(errors.values()) < 1e-4  # CPUs compute the loss in fp32 whatever the networks take


def test_step() -> None:
    figures = figures_of("step")
    assert figures["broken_terms"] == []
    assert figures["deterministic"]["parameters"] > 20
    assert figures["deterministic"]["different"] == 0


def test_speed() -> None:
    figures = figures_of("speed", TINY)
    assert figures.keys() == {"2", "4"}
    for at in figures.values():
        assert at["ours_to_plain"] == pytest.approx(at["ours"] / at["plain"])


def test_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that 6 images fit into: the search ends there, and the plain step beside ours gets half."""
    from benchmarks.gpu_check import batch

    def trial(given: Setting, images: int) -> dict[str, float]:
        if images > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"images_per_second": 1.0 * images, "peak_mb": 10.0}

    def both(given: Setting, images: int) -> dict[str, float]:
        if images > 3:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
        return {"ours": 1.0}

    monkeypatch.setattr(batch, "_trial", trial)
    monkeypatch.setattr(batch, "against_plain", both)
    figures = dict(batch.measure(TINY))
    assert figures["largest"] == 6
    assert [size for size, found in figures["tried"].items() if found is None] == ["8", "7"]
    assert figures["against_plain"] == {"images": 3, "ours": 1.0}


def test_a_batch_that_is_tried() -> None:
    figures = figures_of("batch", replace(ONE, largest=4))
    assert figures["largest"] == 4  # the limit of this setting: a CPU has no memory of its own that could run out
    assert figures["tried"].keys() == {"2", "4"}
    assert figures["against_plain"]["images"] == 4


def test_only_a_lack_of_memory_is_swallowed() -> None:
    def wrong() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        setting.unless_full(wrong)


def test_memory_and_estimate() -> None:
    figures = figures_of("memory")
    for at in figures.values():
        assert at["estimate_mb"] > 1024  # CUDA's own is in it
        assert at["peak_mb"] > 100


def test_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOKD_GPU_CHECK_TRACES", str(tmp_path))
    figures = figures_of("trace")
    for at in figures.values():
        longest = at["longest"]
        assert longest == sorted(longest, key=lambda kernel: -kernel["ms"])
        assert 0.3 < sum(kernel["part"] for kernel in longest) <= 1.0
        events = json.loads(gzip.decompress((tmp_path / at["trace"]).read_bytes()))["traceEvents"]
        assert len(events) > 100


def test_photometrics() -> None:
    figures = figures_of("photometrics")
    assert figures["differing_pixels"] < 1e-4
    assert figures["kernels"] == "torch operations"
    assert all(rate > 0 for rate in figures["images_per_second"].values())


def test_loader() -> None:
    figures = figures_of("loader")
    for backend in ("torchvision", "ffcv"):
        assert figures[backend]["images_per_second_with_step"] > 0
        assert 0 <= figures[backend]["wait_fraction"] <= 1


def test_without_ffcv_its_loader_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_check import loader

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(loader, "_fed", lambda *arguments: {})
    assert dict(loader.measure(TINY))["ffcv"] == "not installed"


def test_parallel() -> None:
    figures = figures_of("parallel")
    assert figures["ranks"] == 2
    for strategy in ("ddp", "fsdp"):
        found = figures[strategy]
        assert found["backend"] == "gloo"
        assert found["loss_error"] < 1e-4
        assert found["batchnorm_error"] < 1e-4


def test_one_rank_alone_has_a_group_too() -> None:
    found = parallel._run(ONE, "fsdp", 1)
    assert found["loss_error"] < 1e-5
    assert found["efficiency"] > 0


def test_switches() -> None:
    figures = figures_of("switches")
    assert figures.keys() == {"rule", *(name for name, switch in switches.SWITCHES.items() if not switch.compiles)}
    assert figures["execution.overlap_teachers=true"] == "only tried on a GPU"
    kept = figures["execution.recompute_logits=true"]
    assert kept["2"]["losses_differ"] is None
    assert kept["2"]["times_as_fast"] > 0
    assert not figures["precision.deterministic=true"]["becomes_default"]


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({}, "faster at every batch"),
        ({"times_as_fast": 1.04}, "1.04 times as fast at 64"),
        ({"times_the_memory": 1.2}, "1.20 times the memory at 64"),
        ({"first_step_seconds": 700.0}, "its first step of 700 s is not won back within an hour at 64"),
        ({"losses_differ": "branch 1, total: 1 and 2"}, "branch 1, total: 1 and 2"),
    ],
)
def test_the_rule_for_defaults(changes: dict[str, Any], because: str) -> None:
    good = {"times_as_fast": 1.2, "times_the_memory": None, "first_step_seconds": 60.0, "losses_differ": None}
    verdict = switches.verdict("execution.compile=true", {"8": good, "64": {**good, **changes}}, (8, 64))
    assert verdict == {"becomes_default": not changes, "because": because}


def test_what_was_not_measured_at_every_batch_becomes_no_default() -> None:
    good = {"times_as_fast": 1.2, "times_the_memory": None, "first_step_seconds": 60.0, "losses_differ": None}
    for found in ({"8": good}, {"8": good, "64": "does not fit into the GPU's memory"}):
        verdict = switches.verdict("execution.compile=true", found, (8, 64))
        assert verdict == {"becomes_default": False, "because": "not measured at 64"}


def test_graphs_are_tried_on_gpus_alone() -> None:
    assert figures_of("graphs") == {"rule": switches.RULE, "execution.cuda_graphs=true": "only tried on a GPU"}


def test_every_switch_is_tried_by_one_of_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "_against", lambda *arguments: None)
    tried = [name for part in ("switches", "compile") for name in figures_of(part) if name != "rule"]
    assert sorted(tried) == sorted(switches.SWITCHES)


@pytest.mark.slow  # minutes of compiling
@pytest.mark.timeout(1800)
def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    figures = figures_of("compile")
    assert figures["execution.compile=true"]["2"]["losses_differ"] is None


def test_a_switch_is_thrown_as_a_configuration_would_throw_it() -> None:
    config = switches.changed(tiny_config(), switches.SWITCHES["execution.compile=true"])
    assert config.execution.compile


def test_parts_are_recorded_one_by_one_each_in_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, results = tmp_path / "tiny.yaml", tmp_path / "results"
    config.write_text(dump_yaml(tiny_config()))
    arguments = [
        "--device",
        "cpu",
        "--config",
        str(config),
        "--results",
        str(results),
        "--part",
        "kernels",
        "--patience",
        "20",
    ]
    assert command.main(arguments) == 0
    record = json.loads((results / "gpu-cpu.json").read_text())
    assert record["parts"]["kernels"]["fp32"] < 1e-4
    assert record["card"] == {"name": "cpu"}
    assert record["machine"]["versions"]["torch"]
    assert record["measured"]["kernels"].keys() == {"commit", "at", "seconds"}
    assert [path.name for path in results.iterdir()] == ["gpu-cpu.json"]
    # what is recorded is not measured again
    monkeypatch.setattr(run, "in_process", lambda *arguments: pytest.fail("measured again"))
    assert command.main(arguments) == 0


def test_a_part_that_fails_keeps_its_figures_and_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[tuple[dict[str, Any], str | None]] = iter(
        [({"fp32": 1.0}, "fp32: too far off"), ({"8": 1}, None), ({"fp32": 0.0}, None)]
    )
    monkeypatch.setattr(run, "in_process", lambda *arguments: next(answers))
    config = tiny_config()
    record = Record.of(CPU, tmp_path)
    assert not check(config, record, "cpu", ["kernels", "speed"], patience=1.0, again=False)
    again = Record.of(CPU, tmp_path)
    assert again.document["problems"] == {"kernels": "fp32: too far off"}
    assert again.document["parts"] == {"kernels": {"fp32": 1.0}, "speed": {"8": 1}}
    assert check(config, again, "cpu", ["kernels", "speed"], patience=1.0, again=False)
    assert Record.of(CPU, tmp_path).document["problems"] == {}


def test_a_part_that_does_not_end_is_ended(tmp_path: Path) -> None:
    figures, problem = in_process("speed", tiny_config(), "cpu", SECONDS["speed"] / 100, tmp_path)
    assert figures == {}
    assert problem == f"not done within {SECONDS['speed'] / 100} s; --patience 0.02 gives more"


def test_what_a_part_says_is_the_problem_that_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(given: Setting) -> Iterator[tuple[str, Any]]:
        yield "first", 1
        raise DataError("the second is too far off")

    monkeypatch.setattr(run, "measure_of", lambda part: wrong)
    config, found = tmp_path / "tiny.yaml", tmp_path / "found.json"
    config.write_text(dump_yaml(tiny_config()))
    assert run.main("kernels", str(config), "cpu", str(found)) == 1
    assert json.loads(found.read_text()) == {"figures": {"first": 1}, "problem": "the second is too far off"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "error: a GPU is wanted, but rank 0 can use none" in capsys.readouterr().out


def test_losses_that_differ_are_seen() -> None:
    assert parallel_rank._relative([{"total": 1.1}], [{"total": 1.0}]) == pytest.approx(0.1)
    assert replace(TINY, batches=(1,)).sized(12).optim.global_batch == 12
