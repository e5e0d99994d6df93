"""An image for the stand-in for Apptainer in `tests/programs`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

APPTAINER = Path(__file__).parent / "programs" / "apptainer"
PYTHON = "/opt/image/bin/python3"  # only there, so that whoever runs it is inside


def make_image(folder: Path) -> Path:
    """A folder with this Python and the host's programs, and nothing else of the host."""
    for name in ("bin", "sbin", "lib", "lib64"):
        here = Path("/") / name
        if here.is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(os.readlink(here))
    for name in ("tmp", "proc", "sys", "dev", "opt/image/bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    content = ["/usr", "/etc", *dict.fromkeys([sys.base_prefix, sys.prefix])]
    content += [f"/{name}" for name in ("bin", "lib", "lib64") if not (folder / name).is_symlink()]
    (folder / ".content").write_text("\n".join(content))
    python = folder / PYTHON.lstrip("/")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder
