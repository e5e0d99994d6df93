"""The fused loss on a block of logits, on CPUs: compiled (`native/prototypes.cpp`), in fp32, prototype by prototype.

Every tile of prototypes is read and written in its core's cache. Blocks of another type, or laid out row by row, are
done by `plain`.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.core.native_library import built
from mokd.losses.kernels import plain
from mokd.losses.kernels.targets import Cuts

BY_PROTOTYPE = True
TAKES_SCALE = True
_TILE = 256
log = logging.getLogger(__name__)


class _Term(ctypes.Structure):
    """Term of native/prototypes.cpp."""

    _fields_ = [
        ("p", ctypes.c_void_p),
        ("views", ctypes.c_int64),
        ("paired", ctypes.c_int32),
        ("first_view", ctypes.c_int32),
        ("factor", ctypes.c_float),
    ]


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    path = built(Path(__file__).parents[2])
    if path is None:
        log.info("the compiled loss was not built; it is computed by torch, more slowly")
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("%s: cannot be loaded (%s); the loss is computed by torch, more slowly", path, error)
        return None
    pointer, long, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    shape = [long, long, long]
    library.mokd_observe.argtypes = [pointer, pointer, *shape, real, *[pointer] * 3, long, long, *[pointer] * 3]
    library.mokd_gradient.argtypes = [pointer, *shape, *[pointer] * 4, long, long]
    library.mokd_through_norm.argtypes = [*[pointer] * 5, long, long, real, ctypes.c_int32]
    for function in (library.mokd_observe, library.mokd_gradient, library.mokd_through_norm):
        function.restype = None
    return library


def observe(z: Tensor, raw: Tensor, scale: float | Tensor, cuts: Cuts, dots: Tensor) -> tuple[Tensor, Tensor]:
    """As `plain.observe`; rows are cut into tiles."""
    if not (_fits(z, cuts) and by_prototype(raw)):
        return plain.observe(z, raw, scale, cuts, dots)
    return _observe(raw, z, scale, None, cuts, dots)


def gradient(
    x: Tensor, factor: Tensor, cuts: Cuts, dtype: torch.dtype, largest: Tensor | None, scale: Tensor | None
) -> Tensor:
    """As `plain.gradient`."""
    if not _fits(x, cuts) or dtype != x.dtype:
        return plain.gradient(x, factor, cuts, dtype, largest, scale)
    library = _library()
    assert library is not None
    views, batch, count = x.shape
    factor, largest = _by_tile(factor), None if largest is None else _by_tile(largest)
    optional = (_address(largest), _address(scale))
    library.mokd_gradient(x.data_ptr(), count, views, batch, factor.data_ptr(), *optional, *_terms(cuts), _TILE)
    return x


def through_norm(towards: Tensor, v: Tensor, norm: Tensor, g: Tensor, unit: float, *, scaled: bool) -> Tensor:
    """As `plain.through_norm`."""
    library = _library()
    tensors = (towards, v, norm, g)
    if library is None or not all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return plain.through_norm(*tensors, unit, scaled=scaled)
    towards_gain = torch.empty_like(g)
    library.mokd_through_norm(*(t.data_ptr() for t in (*tensors, towards_gain)), *towards.shape, unit, scaled)
    return towards_gain


def softmax(logits: Tensor, center: Tensor | None, temperature: float, out: Tensor) -> Tensor | None:
    """`softmax((logits - center) / temperature)` over the prototypes, in `out`, which may be `logits`.

    None where it is not for this module.
    """
    if not (_fits(logits, ()) and by_prototype(out)):
        return None
    largest, total = _observe(logits, out, 1.0 / temperature, center, (), torch.empty(0))
    log_z = (largest + total.log_()).logsumexp(dim=-1, keepdim=True)
    return gradient(out, (largest - log_z).exp_(), (), out.dtype, None, None)


def by_prototype(z: Tensor) -> bool:
    """Whether `[V, B, k]` lies in memory as fp32 `[k, V, B]` on a CPU."""
    return z.dtype == torch.float32 and z.device.type == "cpu" and z.permute(2, 0, 1).is_contiguous()


def _observe(
    logits: Tensor, out: Tensor, scale: float | Tensor, offset: Tensor | None, cuts: Cuts, dots: Tensor
) -> tuple[Tensor, Tensor]:
    library = _library()
    assert library is not None
    views, batch, count = out.shape
    tiles = -(-count // _TILE)
    largest, total = (torch.empty(tiles, views, batch).permute(1, 2, 0) for _ in range(2))
    partial = torch.empty(tiles, len(cuts), dtype=torch.float64)
    scales = (1.0, _address(scale)) if isinstance(scale, Tensor) else (scale, None)
    results = (largest.data_ptr(), total.data_ptr(), partial.data_ptr())
    blocks = (logits.data_ptr(), out.data_ptr(), count, views, batch)
    library.mokd_observe(*blocks, *scales, _address(offset), *_terms(cuts), _TILE, *results)
    if cuts:
        dots += partial.sum(dim=0)
    return largest, total


def _terms(cuts: Cuts) -> tuple[ctypes.Array[_Term], int]:
    described = [_Term(p.data_ptr(), p.shape[0], paired, first, factor) for p, factor, paired, first in cuts]
    return (_Term * len(described))(*described), len(described)


def _address(tensor: Tensor | None) -> int | None:
    assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
    return None if tensor is None else tensor.data_ptr()


def _by_tile(values: Tensor) -> Tensor:
    """`[V, B, T]`, which lies as `[T, V, B]`."""
    return values.permute(2, 0, 1).contiguous()


def _fits(z: Tensor, cuts: Cuts) -> bool:
    teachers = {cut.probabilities.shape[0] for cut in cuts if cut.paired}
    alike = all(by_prototype(cut.probabilities) for cut in cuts)
    return by_prototype(z) and alike and len(teachers) <= 1 and available()
