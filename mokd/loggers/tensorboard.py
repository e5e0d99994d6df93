"""TensorBoard: event files in `RUN/tb`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mokd.loggers.base import Continued, Logger


class TensorBoard(Logger):
    """Scalars, histograms and pictures; points after the step that a run goes on from are taken back."""

    def __init__(self, continued: Continued) -> None:
        folder = continued.run.tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        # points after `step` come from an attempt that did not get them into a checkpoint
        self._writer = SummaryWriter(str(folder), purge_step=continued.step + 1, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One curve for each key."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def histogram(self, step: int, key: str, values: NDArray[np.float64]) -> None:
        """Under the key, beside its curve."""
        self._writer.add_histogram(key, values, step)

    def picture(self, step: int, key: str, picture: Image.Image, text: str) -> None:
        """The picture among images, the words among texts."""
        self._writer.add_image(key, np.asarray(picture), step, dataformats="HWC")
        self._writer.add_text(key, text, step)

    def flush(self) -> None:
        """To the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
