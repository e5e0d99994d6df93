"""The compiled part of the package (`native/*.cpp`), called through ctypes: decode, resample, photometrics."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

_POINTER = ctypes.c_void_p


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
    library.mokd_engine_create.restype = _POINTER
    library.mokd_engine_create.argtypes = [ctypes.c_int, ctypes.c_char_p]
    library.mokd_engine_destroy.restype = None
    library.mokd_engine_destroy.argtypes = [_POINTER]
    library.mokd_engine_kernels.restype = ctypes.c_char_p
    library.mokd_engine_kernels.argtypes = [_POINTER]
    library.mokd_cut.restype = None
    integer, long, pointer = ctypes.c_int, ctypes.c_int64, _POINTER
    cut: list[Any] = [pointer, integer, long, *[pointer] * 5, *[integer] * 3, *[pointer] * 4, long, pointer]
    library.mokd_cut.argtypes = cut
    library.mokd_photometrics.restype = None
    real = ctypes.c_float
    photometrics: list[Any] = [pointer, long, integer, pointer, long, pointer, pointer, real, integer]
    photometrics += [*[pointer] * 2, integer]
    library.mokd_photometrics.argtypes = [*photometrics, pointer]
    library.mokd_is_plain_jpeg.restype = integer
    library.mokd_is_plain_jpeg.argtypes = [ctypes.c_char_p, ctypes.c_uint64, pointer, pointer]
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

    @property
    def kernels(self) -> str:
        """The instruction set in use."""
        name: bytes = self._library.mokd_engine_kernels(self._handle)
        return name.decode()

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
        channels: int = 3,
    ) -> NDArray[np.int32]:
        """Reads n samples from the open `file`, decodes each once, and cuts its views into `out`.

        offsets, sizes, widths, heights, jpeg: `[n]`. geometry: `[n, V, 8]`, the box (x, y, width, height) and the area
        the filter may look at, in pixels. flips: `[n, V]`. cut_sizes: `[V]`. out: `[n, sum C S_v^2]`, each view planar.
        Returns the status of each sample, an index into `STATUS`; the output of a failed sample is undefined.
        """
        n, views = flips.shape
        arrays: list[NDArray[Any]] = [
            np.ascontiguousarray(offsets, np.uint64),
            np.ascontiguousarray(sizes, np.uint64),
            np.ascontiguousarray(widths, np.int32),
            np.ascontiguousarray(heights, np.int32),
            np.ascontiguousarray(jpeg, np.uint8),
        ]
        rest: list[NDArray[Any]] = [
            np.ascontiguousarray(geometry, np.float64),
            np.ascontiguousarray(flips, np.uint8),
            np.ascontiguousarray(cut_sizes, np.int32),
        ]
        row_bytes = int((channels * cut_sizes.astype(np.int64) ** 2).sum())
        assert geometry.shape == (n, views, 8)
        assert out.shape == (n, row_bytes)
        assert out.strides[1] == 1
        status = np.zeros(n, np.int32)
        self._library.mokd_cut(
            self._handle,
            file,
            n,
            *(array.ctypes.data for array in arrays),
            channels,
            1,
            views,
            *(array.ctypes.data for array in rest),
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
        kind: str = "float32",
    ) -> None:
        """Views as `cut` leaves them, normalised: view v of sample i goes to the address outs[v] + i * C S_v^2 numbers.

        parameters: PHOTOMETRIC `[n, V]`, see `data_pipeline.transforms.photometrics`. kind: one of `KINDS`.
        """
        n, views = parameters.shape
        assert len(outs) == views == len(cut_sizes)
        assert len(packed) == n
        assert parameters.dtype == PHOTOMETRIC
        sizes = np.ascontiguousarray(cut_sizes, np.int32)
        parameters = np.ascontiguousarray(parameters)
        means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        addresses = np.asarray(outs, np.uint64)
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
