"""What is asked of an evaluation; checked before anything that takes seconds is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError

TASKS = ("knn", "linear", "semi", "transfer")
NETWORKS = ("teacher", "student", "scratch")


@dataclass(frozen=True)
class Request:
    """The arguments of `mokd eval`.

    source: a run directory, or a file of weights, which needs `backbone` and takes `stem`. branches: all without any.
    name: of the result, by default the task's. again: even where the result is known. held: the checkpoint of a run,
    chosen and verified once by `holding`, for all ranks.
    """

    source: Path
    task: str = "knn"
    network: str = "teacher"
    branches: tuple[str, ...] = ()
    train: Path | None = None
    test: Path | None = None
    overrides: tuple[str, ...] = ()
    name: str | None = None
    again: bool = False
    backbone: str | None = None
    stem: str = "default"
    held: Path | None = None

    def check(self) -> None:
        """UserError for words that are none of those that there are."""
        for option, given, expected in (("--task", self.task, TASKS), ("--network", self.network, NETWORKS)):
            if given not in expected:
                raise UserError(f"{option}: given {given!r}, expected {' or '.join(expected)}")
        if self.name is not None and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise UserError(f"--name: given {self.name!r}, expected the name of a file, not a path")

    def to_json(self) -> dict[str, Any]:
        """For another process of the same job."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Request:
        """The request that `to_json` gave."""
        paths = {key: Path(document[key]) for key in ("source", "train", "test", "held") if document[key] is not None}
        lists = {key: tuple(document[key]) for key in ("branches", "overrides")}
        return cls(**{**document, **paths, **lists})
