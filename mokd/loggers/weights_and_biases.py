"""Weights & Biases, without a network unless WANDB_MODE says otherwise: files in `RUN/wandb`, for `wandb sync`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import wandb
from numpy.typing import NDArray
from PIL import Image

from mokd.loggers.base import Continued, Forgetful


class WeightsAndBiases(Forgetful):
    """Every attempt writes a part of the run, all of one id, which `wandb sync --append` puts together."""

    name = "wandb"
    _run: Any

    def open(self, continued: Continued, known: str | None) -> str:
        """A run named like ours, in the project WANDB_PROJECT or `mokd`."""
        unique = f"{continued.run.path}\0{os.urandom(8).hex()}"
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mokd"),
            name=continued.run.path.name,
            id=known or hashlib.sha256(unique.encode()).hexdigest()[:16],
            dir=str(continued.run.path),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            config=continued.config,
            settings=settings,
        )
        # values may come after those of a later step, as a probe's do, which wandb's own step does not allow
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """All of a step together."""
        self._run.log({**values, "step": step})

    def histogram(self, step: int, key: str, values: NDArray[np.float64]) -> None:
        """Under `histogram/`: a key has one kind of value there."""
        self._run.log({f"histogram/{key}": wandb.Histogram(values.tolist()), "step": step})

    def picture(self, step: int, key: str, picture: Image.Image, text: str) -> None:
        """The words as its caption."""
        self._run.log({key: wandb.Image(picture, caption=text), "step": step})

    def close(self) -> None:
        """Finishes this part of the run."""
        self._run.finish()
