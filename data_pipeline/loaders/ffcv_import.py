"""What makes FFCV quick to import."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def quick_ffcv_import() -> Generator[None]:
    """Within it, FFCV is imported without compiling.

    `ffcv.fields.rgb_image` keeps two constants in a typed dictionary of numba's, and filling one compiles its methods:
    seconds, in every process. FFCV reads it from plain Python alone, where a plain dictionary says the same.
    """
    import numba.typed

    own = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = own
