from __future__ import annotations

import os
import signal

import pytest

from launcher.slurm import client


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
def test_an_order_to_slurm_outlives_the_signals_that_end_the_job(name: str) -> None:
    assert client._command("sh", "-c", f"kill -{name} $$; echo said").strip() == "said"


def test_the_signals_reach_this_process_afterwards() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
    try:
        client._command("sh", "-c", f"kill -USR1 {os.getpid()}")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert noted == [signal.SIGUSR1]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
