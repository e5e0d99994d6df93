"""The compiled part of the package (`native/*.cpp`), called through ctypes: decode, resample, photometrics."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.core.errors import UserError

KERNEL_TAPS = 16  # of a blur: the centre and distances 1 .. 15

# Photometric of native/kernels.h
PHOTOMETRIC = np.dtype(
    [
        ("order", "<i4", 4),
        ("factor", "<f4", 4),
        ("jitter", "<i4"),
        ("grey", "<i4"),
        ("solarize", "<i4"),
        ("kernel", "<f4", KERNEL_TAPS),
        ("taps", "<i4"),
    ]
)

# Status of native/decode.h
STATUS = (
    "fine",
    "the disk reported an error while it was read",
    "the file ends before the sample does",
    "its bytes are not those that were written",
    "not a JPEG of a kind that betons hold",
    "its size is not what the beton says",
    "the decoder could not read it",
    "a crop lies outside of it",
    "not enough memory to decode it",
)

# Type of native/kernels.h
KINDS = ("float32", "float16", "bfloat16")

# mokd_interface of native/library.cpp
_INTERFACE = 2

_INT, _LONG, _REAL, _POINTER, _BYTES = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_char_p
# of every function: what it returns, then its arguments, as library.cpp has them
_FUNCTIONS: dict[str, list[Any]] = {
    "mokd_engine_create": [_POINTER, _INT, _BYTES],
    "mokd_engine_destroy": [None, _POINTER],
    "mokd_cut": [None, _POINTER, _INT, _LONG, *[_POINTER] * 5, *[_INT] * 3, *[_POINTER] * 4, _LONG, _POINTER],
    "mokd_photometrics": [
        *(None, _POINTER, _LONG, _INT, _POINTER, _LONG, _POINTER, _POINTER, _REAL, _INT),
        *(_POINTER, _POINTER, _INT, _POINTER),
    ],
    "mokd_is_plain_jpeg": [_INT, _BYTES, ctypes.c_uint64, _POINTER, _POINTER],
}


def available() -> bool:
    """Whether the library was built."""
    return built(Path(__file__).parents[1]) is not None


@cache
def built(package: Path) -> Path | None:
    """The compiled library in a package's folder; None where it was not built.

    That of another Python does too, for the libraries know nothing of it: a container has its own.
    """
    own = (path for suffix in EXTENSION_SUFFIXES if (path := package / f"_native{suffix}").exists())
    return next(own, next(iter(sorted(package.glob("_native.*.so"))), None))


@cache
def _library() -> ctypes.CDLL:
    path = built(Path(__file__).parents[1])
    if path is None:
        raise UserError(
            "data.backend: ffcv needs the compiled part of data_pipeline, which was not built: install a C++ compiler "
            "and libturbojpeg0-dev and run `make setup`, or use data.backend=torchvision"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        hint = "run `make setup`, or use data.backend=torchvision"
        raise UserError(f"{path}: cannot be loaded ({error}); {hint}") from None
    if not hasattr(library, "mokd_interface") or library.mokd_interface() != _INTERFACE:
        raise UserError(f"{path}: was built from another version of the sources; build it again: make setup")
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of an upright grey or YCbCr JPEG that decodes to its end without a warning, else None."""
    width, height = ctypes.c_int32(), ctypes.c_int32()
    plain = _library().mokd_is_plain_jpeg(content, len(content), ctypes.byref(width), ctypes.byref(height))
    return (width.value, height.value) if plain else None


class Engine:
    """Threads of the native library with their decoders and scratch memory. Calls release the interpreter's lock.

    `kernels` chooses an instruction set (`generic`, `avx2`; default: the best the processor has), for tests.
    """

    def __init__(self, threads: int, kernels: str | None = None) -> None:
        self._library = _library()
        self._handle = self._library.mokd_engine_create(threads, kernels.encode() if kernels else None)
        if not self._handle:
            raise UserError(f"data.workers: {threads} threads could not be started; use fewer")

    def close(self) -> None:
        """Ends the threads and frees their memory."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.mokd_engine_destroy(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def cut(
        self,
        file: int,
        offsets: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        widths: NDArray[np.int64],
        heights: NDArray[np.int64],
        jpeg: NDArray[np.uint8],
        geometry: NDArray[np.float64],
        flips: NDArray[np.bool_],
        cut_sizes: NDArray[np.int32],
        out: NDArray[np.uint8],
        channels: int,
    ) -> NDArray[np.int32]:
        """Reads n samples from the open `file`, decodes each once, and cuts its views into `out`.

        offsets, sizes, widths, heights, jpeg: `[n]`. geometry: `[n, V, 8]`, the box (x, y, width, height) and the area
        the filter may look at, in pixels. flips: `[n, V]`. cut_sizes: `[V]`. out: `[n, sum C S_v^2]`, each view planar.
        Returns the status of each sample, an index into `STATUS`; the output of a failed sample is undefined.
        """
        n, views = flips.shape
        samples = _arrays("u8 u8 i4 i4 u1", offsets, sizes, widths, heights, jpeg)
        cuts = _arrays("f8 u1 i4", geometry, flips, cut_sizes)
        row_bytes = int((channels * cut_sizes.astype(np.int64) ** 2).sum())
        assert geometry.shape == (n, views, 8)
        assert out.shape == (n, row_bytes)
        assert out.strides[1] == 1
        status = np.zeros(n, np.int32)
        self._library.mokd_cut(
            self._handle,
            file,
            n,
            *(array.ctypes.data for array in samples),
            channels,
            1,
            views,
            *(array.ctypes.data for array in cuts),
            out.ctypes.data,
            out.strides[0],
            status.ctypes.data,
        )
        return status

    def photometrics(
        self,
        packed: NDArray[np.uint8],
        cut_sizes: NDArray[np.int32],
        parameters: NDArray[Any],
        threshold: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        outs: list[int],
        kind: str,
    ) -> None:
        """Views as `cut` leaves them, normalised: view v of sample i goes to the address outs[v] + i * C S_v^2 numbers.

        parameters: PHOTOMETRIC `[n, V]`, see `data_pipeline.transforms.photometrics`. kind: one of `KINDS`.
        """
        n, views = parameters.shape
        assert len(outs) == views == len(cut_sizes)
        assert len(packed) == n
        assert parameters.dtype == PHOTOMETRIC
        parameters = np.ascontiguousarray(parameters)
        sizes, means, stds, addresses = _arrays("i4 f4 f4 u8", cut_sizes, mean, std, outs)
        self._library.mokd_photometrics(
            self._handle,
            n,
            views,
            packed.ctypes.data,
            packed.strides[0],
            sizes.ctypes.data,
            parameters.ctypes.data,
            threshold,
            len(mean),
            means.ctypes.data,
            stds.ctypes.data,
            KINDS.index(kind),
            addresses.ctypes.data,
        )


def _arrays(types: str, *given: ArrayLike) -> list[NDArray[Any]]:
    """What is given in contiguous memory, each of its type; to be kept as long as the library reads it."""
    return [np.ascontiguousarray(values, kind) for values, kind in zip(given, types.split(), strict=True)]
