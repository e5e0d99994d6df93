"""What a logger takes, and all loggers of a run as one."""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.core.errors import UserError
from mokd.config import LoggingConfig
from mokd.config.logging import LoggerName
from mokd.runs.files import read_json, replace_json
from mokd.runs.run_directory import RunDirectory

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
Shown = Collection[tuple[int, str]]


@dataclass(frozen=True)
class Continued:
    """The run as a logger finds it at a start.

    step: what the run goes on from. kept: the records of metrics up to there. dropped: steps and keys after it that an
    attempt before has logged; they come again.
    """

    run: RunDirectory
    config: dict[str, Any]
    step: int
    kept: Sequence[Record] = ()
    dropped: Shown = ()


class Logger:
    """Takes what a run shows; what a logger has no place for it leaves out."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of a step."""

    def histogram(self, step: int, key: str, values: NDArray[np.float64]) -> None:
        """A distribution."""

    def picture(self, step: int, key: str, picture: Image.Image, text: str) -> None:
        """A picture, and in Markdown what it shows."""

    def flush(self) -> None:
        """Brings everything to the disk."""

    def close(self) -> None:
        """The end of this attempt."""


class Forgetful(Logger, ABC):
    """A logger that can take nothing back: steps that come again after a resume are sent once.

    A run that it did not have yet gets the curve so far from the metrics.
    """

    name: LoggerName

    def __init__(self, continued: Continued) -> None:
        known = read_json(continued.run.loggers_file) or {}
        self._id = self.open(continued, known.get(self.name))
        self._sent = set(continued.dropped) if self.name in known else set()
        if self.name not in known:
            for record in continued.kept:
                self.scalars(int(record["step"]), {k: v for k, v in record.items() if k != "step" and v is not None})
        replace_json(continued.run.loggers_file, {**known, self.name: self._id}, durable=True)

    @abstractmethod
    def open(self, continued: Continued, known: str | None) -> str:
        """Opens the run of that id, or a new one, and returns its id."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Those that are new."""
        if fresh := {key: value for key, value in values.items() if (step, key) not in self._sent}:
            self.send(step, fresh)

    @abstractmethod
    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""


def check(config: LoggingConfig) -> None:
    """UserError when a logger's library is not installed."""
    for name in config.chosen:
        if importlib.util.find_spec(name) is None:
            package = name if name == "tensorboard" else f"'mokd[{name}]'"  # an extra, but for what always comes along
            raise UserError(
                f"logging.loggers: {name} is not installed; pip install {package}, or leave it out of the list"
            )


def open_loggers(config: LoggingConfig, attempt: int, continued: Continued) -> Loggers:
    """The loggers of the configuration. One that cannot be opened is said in a warning; training goes on without it."""
    opened: dict[str, Logger] = {}
    openers: dict[str, Callable[[Continued], Logger]] = {name: partial(_open, name) for name in config.chosen}
    if config.prometheus is not None:
        from mokd.loggers.prometheus import Prometheus

        openers["prometheus"] = partial(Prometheus, config.prometheus, attempt)
    for name, opener in openers.items():
        try:
            opened[name] = opener(continued)
        except Exception as error:  # whatever a library raises: no logger is worth the run
            log.warning("%s cannot be written (%s); metrics.jsonl goes on", TITLES[name], _in_short(error))
    return Loggers(opened)


TITLES = {
    "tensorboard": "TensorBoard",
    "wandb": "Weights & Biases",
    "mlflow": "MLflow",
    "prometheus": "logging.prometheus",
}


def _open(name: LoggerName, continued: Continued) -> Logger:
    # each imports its library: only those that are asked for
    match name:
        case "tensorboard":
            from mokd.loggers.tensorboard import TensorBoard

            return TensorBoard(continued)
        case "wandb":
            from mokd.loggers.weights_and_biases import WeightsAndBiases

            return WeightsAndBiases(continued)
        case "mlflow":
            from mokd.loggers.mlflow import MLflow

            return MLflow(continued)


class Loggers(Logger):
    """Several as one. One that fails is told of once and left out from then on."""

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        self._each(lambda logger: logger.scalars(step, values))

    def histogram(self, step: int, key: str, values: NDArray[np.float64]) -> None:
        """To all."""
        self._each(lambda logger: logger.histogram(step, key, values))

    def picture(self, step: int, key: str, picture: Image.Image, text: str) -> None:
        """To all."""
        self._each(lambda logger: logger.picture(step, key, picture, text))

    def flush(self) -> None:
        """All."""
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        """All."""
        self._each(lambda logger: logger.close())

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                act(logger)
            except Exception as error:  # whatever a library raises: no logger is worth the run
                self._loggers.pop(name, None)
                log.warning("%s cannot be written (%s); training goes on without it", TITLES[name], _in_short(error))


def _in_short(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
