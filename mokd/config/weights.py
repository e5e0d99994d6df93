"""Where a branch's first weights come from: the words of `branches.N.init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mokd.config.paths import absolute_path

Kind = Literal["timm", "hub", "torchvision", "run", "file"]
_WORDS: tuple[Kind, ...] = ("hub", "torchvision", "run")
_EXPECTED = {"hub": "OWNER/REPOSITORY", "torchvision": "WEIGHTS", "run": "RUN/BRANCH"}


@dataclass(frozen=True)
class InitSource:
    """A source of weights. name: the repository, torchvision's weights, the run's directory or the file, nothing for
    timm; branch: of a run.
    """

    kind: Kind
    name: str = ""
    branch: str = ""


def parse_init(text: str) -> InitSource:
    """From `timm`, `hub:REPOSITORY`, `torchvision:WEIGHTS`, `run:RUN/BRANCH` or a file's path; else ValueError."""
    word, colon, name = text.partition(":")
    if text == "timm":
        return InitSource("timm")
    if colon and word == "timm":
        raise ValueError(f"given {text!r}; expected timm alone; a tag of pretrained weights goes into backbone")
    for kind in _WORDS:
        if colon and word == kind:
            run, slash, branch = name.rpartition("/")
            if not name or (kind in ("run", "hub") and not (slash and run and branch)):
                raise ValueError(f"given {text!r}, expected {kind}:{_EXPECTED[kind]}")
            return InitSource("run", run, branch) if kind == "run" else InitSource(kind, name)
    if not text:
        raise ValueError("is empty; expected timm, hub:..., torchvision:..., run:... or a file")
    return InitSource("file", text)


def absolute_init(text: str, before: str | None = None) -> str:
    """The same source with its path as this working directory means it, or as `before`, absolute, did."""
    source, earlier = parse_init(text), parse_init(before) if before else None
    meant = Path(earlier.name) if earlier and (earlier.kind, earlier.branch) == (source.kind, source.branch) else None
    if source.kind == "file":
        return str(absolute_path(Path(source.name), meant))
    if source.kind == "run":
        return f"run:{absolute_path(Path(source.name), meant)}/{source.branch}"
    return text
