from __future__ import annotations

import math

import pytest

from mokd.optim.schedules import cosine, teacher_temperature, warmup_cosine


def test_cosine_is_half_a_cosine() -> None:
    for step in range(0, 101, 10):
        expected = 1.0 + 0.5 * (0.996 - 1.0) * (1 + math.cos(math.pi * step / 100))
        assert cosine(step, 100, 0.996, 1.0) == pytest.approx(expected, abs=1e-15)
    assert cosine(250, 100, 0.04, 0.4) == pytest.approx(0.4)


def test_rate_rises_linearly_then_falls_to_its_end() -> None:
    values = [warmup_cosine(step, 100, 10, 0.1, 0.0048) for step in range(101)]
    assert values[0] == 0.0
    assert values[5] == pytest.approx(0.05)
    assert values[10] == pytest.approx(0.1)
    assert values[55] == pytest.approx((0.1 + 0.0048) / 2)
    assert values[100] == pytest.approx(0.0048)


def test_a_warmup_longer_than_the_run_stays_linear() -> None:
    assert warmup_cosine(4, 5, 10, 1.0, 0.0) == pytest.approx(0.4)


def test_teacher_temperature_by_epoch() -> None:
    values = [teacher_temperature(epoch, 30, 0.04, 0.07) for epoch in range(40)]
    assert values[0] == pytest.approx(0.04)
    assert values[29] == pytest.approx(0.07)
    assert values[10] == pytest.approx(0.04 + 0.03 * 10 / 29)
    assert set(values[30:]) == {0.07}
    assert teacher_temperature(0, 0, 0.04, 0.07) == 0.07
    assert teacher_temperature(0, 1, 0.04, 0.07) == 0.04
