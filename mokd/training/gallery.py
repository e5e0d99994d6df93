"""Pictures of the current views, with their draws, for the loggers: made by a thread, at a slow cadence."""

from __future__ import annotations

import json
import logging
import threading

from data_pipeline.beton.samples import open_samples
from data_pipeline.core.errors import DataError, UserError
from data_pipeline.loaders.picture import view_picture
from data_pipeline.sampling.order import subset
from mokd.config import RunConfig
from mokd.loggers.base import Loggers

log = logging.getLogger(__name__)

IMAGES = 4  # spread over the data set, the same at every time


class Gallery:
    """Shows the views that an epoch makes of some images, once in `logging.pictures_every_epochs`."""

    def __init__(self, config: RunConfig, epoch_steps: int, loggers: Loggers) -> None:
        self._config, self._epoch_steps, self._loggers = config, epoch_steps, loggers
        self._thread: threading.Thread | None = None
        self._shown = -1

    def show(self, step: int, epoch: int) -> None:
        """At the first logged step of an epoch that is due: begins to make the picture."""
        logging_, first = self._config.logging, epoch * self._epoch_steps
        every = logging_.pictures_every_epochs
        if self._config.data.channels != 3:
            return  # colours are what a picture shows
        if every is None or not logging_.chosen or epoch % every or epoch == self._shown:
            return
        self._shown = epoch
        if step - first > logging_.every_steps or (self._thread is not None and self._thread.is_alive()):
            return  # resumed within an epoch that has its picture
        self._thread = threading.Thread(target=self._make, args=(step, epoch), name="gallery", daemon=True)
        self._thread.start()

    def _make(self, step: int, epoch: int) -> None:
        config = self._config
        try:
            samples = open_samples(config.data.train, config.data.channels)
            kept = subset(samples.size, config.data.limit)
            chosen = [int(kept[i * (len(kept) - 1) // max(IMAGES - 1, 1)]) for i in range(min(IMAGES, len(kept)))]
            picture, facts = view_picture(samples, config.views, config.seed, epoch, chosen)
        except (DataError, UserError, OSError) as error:
            log.warning("the views cannot be drawn (%s); training goes on", error)
            return
        text = f"Views of epoch {epoch}; boxes in pixels of the stored images.\n\n" + "\n".join(
            f"    {json.dumps({'sample': sample['sample'], **view})}" for sample in facts for view in sample["views"]
        )
        self._loggers.picture(step, "views", picture, text)

    def close(self) -> None:
        """Waits for a picture under way."""
        if self._thread is not None:
            self._thread.join(timeout=10.0)
