"""Importing much at once."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Generator[None]:
    """Within it the garbage collector rests; what is there at the end it never looks at again.

    For the imports of a process that lives long. They make objects by the hundred thousand, all of which stay, and set
    off collections that go through them again and again; so would every full collection later, amid training.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
