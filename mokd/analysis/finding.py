"""One finding of an analysis: a picture, the numbers in it, and a sentence that says what is to be seen."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from mokd.analysis.members import Gathering
from mokd.runs.files import replace_bytes, replace_json

DPI = 110


@dataclass(frozen=True)
class Finding:
    """name: of its files; alt: the sentence; figure: matplotlib's."""

    name: str
    alt: str
    numbers: dict[str, Any]
    figure: Any

    def write(self, folder: Path, about: dict[str, Any]) -> list[Path]:
        """Writes `<name>.png`, `.svg` and `.json` (with `about`, what was analyzed), each by rename. UserError."""
        files = [folder / f"{self.name}.{kind}" for kind in ("png", "svg", "json")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in files[:2]:
                stream, kind = io.BytesIO(), path.suffix[1:]
                # without dates, so that the same networks give the same files
                metadata = {"Date": None, "Title": self.alt} if kind == "svg" else {"Description": self.alt}
                self.figure.savefig(stream, format=kind, dpi=DPI, metadata=metadata)
                replace_bytes(path, stream.getvalue())
            replace_json(files[2], {**about, "alt": self.alt, **self.numbers})
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        return files


@dataclass(frozen=True)
class Part:
    """A part of an analysis. lacks: why a gathering does not allow it, in words; None where it does."""

    find: Callable[[Gathering], Iterator[Finding]]
    lacks: Callable[[Gathering], str | None] = lambda _: None


def one_branch(gathering: Gathering) -> str | None:
    """What is lacking where two networks are to be compared."""
    return None if gathering.pairs() else "compares two branches, and there is one"
