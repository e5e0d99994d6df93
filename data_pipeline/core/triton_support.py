"""Whether Triton's kernels can run here. It builds a small C library when the first of them is launched."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def why_no_triton() -> str | None:
    """What keeps Triton from launching on this machine's GPU, also told as a warning, once; None where nothing does."""
    try:
        from triton.runtime import driver  # type: ignore[import-untyped]

        driver.active.get_current_device()  # compiles the library: this takes a C compiler and Python's headers
    except Exception as error:  # ImportError, RuntimeError, CalledProcessError, FileNotFoundError: whatever it meets
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"Triton cannot be used: {reason}. Slower torch operations take its place; a C compiler and Python's "
            "headers (gcc, python3-dev) are what it needs",
            stacklevel=2,
        )
        return reason
    return None
