"""The step benchmark runs, compares like with like, and refuses what differs. No time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import scaling, step, step_ours
from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from benchmarks.step_plain import PlainStep
from data_pipeline.core.errors import DataError
from data_pipeline.core.schema import dump_yaml
from mokd.models.linear import OneDnnLinear
from tests.support import RESNET, THIRD, VIT, mokd, tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("branches", [[VIT], [RESNET, VIT], [RESNET, VIT, THIRD]], ids=["solo", "pair", "three"])
def test_both_contenders_end_in_the_same_networks(branches: list[dict]) -> None:
    config = tiny_config(branches=branches)
    pairs = {"ours": Pair(config, CPU), "plain": Pair(config, CPU)}
    contenders = {"ours": OurStep(pairs["ours"]), "plain": PlainStep(pairs["plain"])}
    step.same_losses(contenders, pairs["ours"].views, "fp32")
    for ours, plain in zip(pairs["ours"].branches, pairs["plain"].branches, strict=True):
        for network in ("student", "teacher"):
            expected = getattr(plain, network).state_dict()
            for name, value in getattr(ours, network).state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=f"{network} {name}")


def test_contenders_that_differ_are_refused() -> None:
    config = tiny_config()
    pair, other = Pair(config, CPU), Pair(tiny_config(objective__student_temp=0.2), CPU)
    with pytest.raises(DataError, match="do not compute the same"):
        step.same_losses({"ours": OurStep(pair), "plain": PlainStep(other)}, pair.views, "fp32")


def test_the_command_reports_what_it_promises(tmp_path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_yaml(tiny_config()))
    done = mokd("bench", "step", path, "--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["images_per_second"]) == {"ours", "plain"}
    assert set(result["ratios"]) == {"step", "peak_memory", "fused_loss", "monitors"}
    assert 0 < result["mfu"] < 1
    phases = {"student_forward", "teacher_forward", "loss", "backward", "optimizer", "teacher_average", "centers"}
    assert set(result["phases_ms"]) == phases
    assert all(ms >= 0 for ms in result["phases_ms"].values())


def test_a_phase_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0])  # begins, inner begins, inner ends, ends
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = step_ours.Clock(CPU)
    inner = clock.timed("inner", lambda: None)
    clock.timed("outer", inner)()
    assert clock.ms == {"inner": 3000.0, "outer": 7000.0}


def test_bytes_per_step_are_those_of_the_gradients() -> None:
    pair = Pair(tiny_config(branches=[VIT]), CPU)
    sent = scaling.bytes_per_step(pair.branches, pair.config)
    OurStep(pair)(pair.views, FIRST_STEP)  # all parameters have had a gradient, though it is dropped by now
    trained = [p for p in pair.branches[0].student.parameters() if p.requires_grad]
    assert sent["gradients"] == sum(p.numel() * p.element_size() for p in trained)
    assert sent["batchnorm"] == 0
    assert sent["centers"] == pair.objective.centers.numel() * 4


def test_predicted_efficiency() -> None:
    # 2 ranks send the whole size once: 1 GB at 1 GB/s is a second, half of it hidden
    assert scaling.predicted_efficiency(10**9, 2, 1e9, 2.0, 0.5) == pytest.approx(2.0 / 2.5)
    assert scaling.predicted_efficiency(10**9, 2, 1e12, 2.0, 0.5) == 1.0


def test_scaling_measures_real_ranks() -> None:
    effort = step.Effort(rounds=1, steps=1, warmup=0)
    result = scaling.run(tiny_config(), effort, print)
    assert result["efficiency"]["1"] == 1.0
    assert all(rate > 0 for rate in result["images_per_second"].values())
    assert all(0 < e <= 1 for link in result["computed"]["efficiency"].values() for e in link.values())


def test_products_of_onednn_are_counted_as_those_of_torch() -> None:
    """On every processor: where oneDNN is not chosen, its layers are asked for here."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch is built without oneDNN")
    x, layer, counts = torch.randn(3, 5, 8, requires_grad=True), nn.Linear(8, 6), []
    for make in (nn.Linear, OneDnnLinear):
        layer.__class__ = make
        with step.counting_flops() as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 15 * 8 * 6
