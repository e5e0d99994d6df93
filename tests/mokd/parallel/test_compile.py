"""Compiled networks equal eager ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step_ours import FIRST_STEP, OurStep, Pair
from tests.support import RESNET, VIT, tiny_config


@pytest.mark.slow  # minutes of compiling
@pytest.mark.timeout(1800)
def test_compiled_equals_eager(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        pair = Pair(tiny_config(branches=[RESNET, VIT], execution__compile=compiled), torch.device("cpu"))
        step = OurStep(pair)
        terms = [step(pair.views, FIRST_STEP + number) for number in range(2)]
        found.append((terms, [b.student.state_dict() for b in pair.branches]))
    (eager_terms, eager), (terms, compiled_state) = found
    for a, b in zip(eager_terms, terms, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for a, b in zip(eager, compiled_state, strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert any(tmp_path.rglob("*.py")) or any(tmp_path.rglob("*.so")), "compiled code is kept in the user's cache"
