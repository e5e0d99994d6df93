"""FFCV's loader, running one operation: decode a JPEG once and cut all its views into one packed block.

FFCV runs the pipeline in its own thread, some batches ahead. Its own buffers are made anew every epoch and a batch in
them lives until the next is asked for; ours are made once, and pinned when they go to a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.beton.format import BetonInfo
from data_pipeline.core.errors import DataError, UserError
from data_pipeline.core.host_memory import Packed, Ring
from data_pipeline.core.native_library import STATUS, Engine
from data_pipeline.loaders.ffcv_import import quick_ffcv_import
from data_pipeline.sampling.order import Int64Array

try:
    with quick_ffcv_import():
        import ffcv.loader.epoch_iterator as epoch_iterator_module
        import ffcv.loader.loader as ffcv_loader_module
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.memory_managers.base import MemoryContext, MemoryManager
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.state import State
except ImportError as error:
    raise UserError(
        f"data.backend: ffcv cannot be imported ({error}): run `make setup`, or use data.backend=torchvision"
    ) from None

_POLL_SECONDS = 0.2

# FFCV's thread starts on device 0 and would return there from its streams: with a CUDA context of every local rank on
# the first GPU, some 0.5 GB each. What runs in it is all on the CPU.
epoch_iterator_module.IS_CUDA = False


@dataclass(frozen=True)
class CutPlan:
    """What to cut from B samples, V views of each.

    geometry: float64 `[B, V, 8]`, see `native_library.Engine.cut`. flips: bool `[B, V]`. parameters: uint8
    `[B, bytes]`, handed on with the crops.
    """

    geometry: NDArray[np.float64]
    flips: NDArray[np.bool_]
    parameters: NDArray[np.uint8]


@dataclass(frozen=True)
class EpochPlan:
    """The samples of an epoch in order (int64 `[n]`), and how to plan the cuts of some of them.

    FFCV takes it for its order of samples and deals it out in slices, so that each batch has its plan with it. Cuts are
    planned batch by batch in FFCV's thread: for a whole epoch they would take gigabytes and delay the first batch.
    """

    ids: Int64Array
    cuts: Callable[[Int64Array], CutPlan]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> EpochPlan:
        return EpochPlan(self.ids[part], self.cuts)


class _Epoch(EpochIterator):
    """FFCV's thread for one epoch."""

    def run_pipeline(self, number: int, batch: EpochPlan, slot: int, event: None) -> tuple[Packed | BaseException]:
        # FFCV looks at its event only when its queue is full, and would finish an epoch that was left
        if self.terminate_event.is_set():
            raise StopIteration
        try:
            return super().run_pipeline(number, batch, slot, event)
        except BaseException as failure:  # in FFCV's thread it would leave the reader waiting for ever
            return (failure,)


class _NoManager(MemoryManager, MemoryContext):
    """Nothing: FFCV's own maps samples to pages in Python dictionaries, 700 MB for ImageNet, and we read on our own."""

    state = state_type = None

    def __init__(self, reader: Any) -> None:
        pass

    def schedule_epoch(self, batches: Any) -> MemoryContext:
        return self

    def compile_reader(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Cut(SimpleRGBImageDecoder):
    """Decodes each sample of a batch once and cuts what its plan says into the next slot of the ring.

    A subclass of FFCV's decoder only because FFCV takes nothing else for a decoder of its image field.
    """

    def __init__(self, beton: BetonInfo, sizes: NDArray[np.int32], engine: Engine, ring: Ring) -> None:
        super().__init__()
        self._beton, self._sizes, self._engine, self._ring = beton, sizes, engine, ring
        self._file = os.open(beton.path, os.O_RDONLY | os.O_CLOEXEC)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, kind = (1,), np.dtype("<u1")  # FFCV's own buffer is not used
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., Packed]:
        def cut(batch: EpochPlan, out: NDArray[np.uint8], metadata: Any, storage: Any) -> Packed:
            return self._cut(batch.ids, batch.cuts(batch.ids))

        return cut

    def _cut(self, ids: Int64Array, plan: CutPlan) -> Packed:
        beton, packed = self._beton, self._ring.next(ids, self._beton.labels[ids])
        places = (beton.offsets[ids], beton.sizes[ids], beton.widths[ids], beton.heights[ids], beton.jpeg[ids])
        cuts = (plan.geometry, plan.flips, self._sizes, packed.crops, beton.channels)
        status = self._engine.cut(self._file, *places, *cuts)
        if status.any():
            first = int(np.flatnonzero(status)[0])
            reason = STATUS[status[first]]
            raise DataError(
                f"{beton.describe(int(ids[first]))}: {reason}; `mokd verify {beton.path}` lists all bad samples"
            )
        packed.parameters[:] = plan.parameters
        return packed

    def close(self) -> None:
        os.close(self._file)


class FfcvCuts:
    """Cuts views from the samples of a beton through FFCV's loader, in any order, some batches ahead.

    sizes: int32 `[V]`. parameter_bytes: of `CutPlan.parameters`, per sample. ahead: batches. timeout: seconds.
    """

    def __init__(
        self,
        beton: BetonInfo,
        sizes: NDArray[np.int32],
        batch_size: int,
        engine: Engine,
        ahead: int,
        timeout: float,
        *,
        parameter_bytes: int = 0,
        pinned: bool = False,
    ) -> None:
        self._timeout, self._path = timeout, beton.path
        crop_bytes = int((beton.channels * sizes.astype(np.int64) ** 2).sum())
        # those in the queue, the one being cut, and the two that the reader may hold
        ring = Ring(ahead + 3, batch_size, crop_bytes, parameter_bytes, pinned)
        self._cut = _Cut(beton, sizes, engine, ring)
        threads = torch.get_num_threads()
        # the operation is one native call per batch: nothing is left for Numba to compile
        Compiler.set_enabled(False)
        own_manager = ffcv_loader_module.OSCacheManager
        ffcv_loader_module.OSCacheManager = _NoManager
        try:
            self._loader = Loader(
                str(beton.path),
                batch_size,
                num_workers=1,
                order=OrderOption.SEQUENTIAL,
                pipelines={"image": [self._cut], "label": None},
                batches_ahead=ahead,
                drop_last=False,
            )
        finally:
            Compiler.set_enabled(True)
            ffcv_loader_module.OSCacheManager = own_manager
            torch.set_num_threads(threads)
        # we have our own tables, and give each epoch its order
        self._loader.reader.alloc_table = self._loader.indices = self._loader.traversal_order = None
        self._loader.first_traversal_order = None
        self._iterator: Any = None

    def batches(self, plan: EpochPlan) -> Generator[Packed]:
        """Packed batches of the samples in a plan. A batch is valid until the next but one is asked for."""
        self.stop()
        if not len(plan):
            return
        # FFCV sets torch's thread count, in its own thread and so in all, to the number of its workers
        self._loader.num_workers = torch.get_num_threads()
        self._iterator = _Epoch(self._loader, plan)
        try:
            while (packed := self._next()) is not None:
                yield packed
        finally:
            self.stop()

    def _next(self) -> Packed | None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                result = self._iterator.output_queue.get(timeout=_POLL_SECONDS)
            except Empty:
                if not self._iterator.is_alive():
                    raise DataError(f"{self._path}: the loader's thread ended without a word") from None
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{self._path}: no batch within {self._timeout:g} s (data.batch_timeout_seconds); "
                        "is its disk stuck?"
                    ) from None
                continue
            if result is None:
                return None
            found = result[1][0]
            if isinstance(found, BaseException):
                raise found
            return found

    def stop(self) -> None:
        """Ends the running epoch: its thread is joined and its ring buffer freed."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        iterator.terminate_event.set()
        deadline = time.monotonic() + self._timeout
        while iterator.is_alive() and time.monotonic() < deadline:
            try:  # a full queue would keep the thread from ending
                iterator.output_queue.get_nowait()
            except Empty:
                iterator.join(timeout=0.01)
        iterator.close()

    def close(self) -> None:
        """Ends the thread and closes the file."""
        self.stop()
        self._cut.close()
