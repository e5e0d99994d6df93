"""The FFCV loader: one operation decodes a JPEG once and cuts all its views into one packed block.

FFCV runs the pipeline in its own thread, some batches ahead, into a ring of buffers; batches are copied out of the ring
before anyone sees them. Order and draws are ours, pure functions of the epoch and the sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from queue import Empty
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import ViewBatch
from data_pipeline.beton import BetonInfo, open_beton
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.draws import ViewDraws, draw_views, view_sizes
from data_pipeline.errors import DataError, UserError
from data_pipeline.native_library import STATUS, Engine
from data_pipeline.order import Int64Array, epoch_order, rank_batches, subset
from data_pipeline.photometrics import Photometrics

try:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State
    from ffcv.traversal_order.base import TraversalOrder
except ImportError as error:
    raise UserError(
        f"data.backend: ffcv cannot be imported ({error}): run `make setup`, or use data.backend=torchvision"
    ) from None

_POLL_SECONDS = 0.2


class _GivenOrder(TraversalOrder):
    """Hands FFCV the samples of the epoch that is about to start."""

    order: Int64Array

    def sample_order(self, epoch: int) -> Int64Array:
        return self.order


class _Cut(SimpleRGBImageDecoder):
    """Decodes each sample of a batch once and cuts `geometry(sample ids)` from it: uint8 `[B, packed bytes]`.

    A subclass of FFCV's decoder only because FFCV takes nothing else for a decoder of its image field.
    """

    def __init__(self, beton: BetonInfo, sizes: NDArray[np.int32], engine: Engine) -> None:
        super().__init__()
        self.geometry: Callable[[Int64Array], tuple[NDArray[np.float64], NDArray[np.bool_]]]
        self.failure: BaseException | None = None
        self._beton, self._sizes, self._engine = beton, sizes, engine
        self._file = os.open(beton.path, os.O_RDONLY | os.O_CLOEXEC)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, kind = (int((3 * self._sizes.astype(np.int64) ** 2).sum()),), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=kind), AllocationQuery(shape, kind)

    def generate_code(self) -> Callable[..., NDArray[np.uint8]]:
        def cut(ids: Int64Array, out: NDArray[np.uint8], metadata: Any, storage: Any) -> NDArray[np.uint8]:
            # an exception in FFCV's thread would leave the reader waiting for ever: keep it for the reader
            try:
                self._cut(ids, out[: len(ids)])
            except BaseException as failure:
                self.failure = failure
                raise StopIteration from None  # which FFCV takes for the end of the epoch
            return out[: len(ids)]

        return cut

    def _cut(self, ids: Int64Array, out: NDArray[np.uint8]) -> None:
        beton = self._beton
        geometry, flips = self.geometry(ids)
        places = (beton.offsets[ids], beton.sizes[ids], beton.widths[ids], beton.heights[ids], beton.jpeg[ids])
        status = self._engine.cut(self._file, *places, geometry, flips, self._sizes, out)
        if status.any():
            first = int(np.flatnonzero(status)[0])
            reason = STATUS[status[first]]
            raise DataError(
                f"{beton.describe(int(ids[first]))}: {reason}; `mokd verify {beton.path}` lists all bad samples"
            )

    def close(self) -> None:
        os.close(self._file)


class FfcvCuts:
    """Cuts views from the samples of a beton through FFCV's loader, in any order, some batches ahead."""

    def __init__(
        self, beton: BetonInfo, sizes: NDArray[np.int32], batch_size: int, engine: Engine, ahead: int, timeout: float
    ) -> None:
        self._timeout, self._path = timeout, beton.path
        self._cut = _Cut(beton, sizes, engine)
        threads = torch.get_num_threads()
        # the operation is one native call per batch: nothing is left for Numba to compile
        Compiler.set_enabled(False)
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
            torch.set_num_threads(threads)
        self._order = _GivenOrder(self._loader)
        self._loader.traversal_order = self._order
        self._iterator: Any = None

    def batches(
        self, order: Int64Array, geometry: Callable[[Int64Array], tuple[NDArray[np.float64], NDArray[np.bool_]]]
    ) -> Iterator[NDArray[np.uint8]]:
        """Packed batches of the samples in `order`. A batch is valid only until the next one is asked for."""
        self.stop()
        self._cut.geometry, self._cut.failure = geometry, None
        self._order.order = order
        self._loader.first_traversal_order = order
        # FFCV sets torch's thread count, in this thread and in its own, to the number of its workers
        self._loader.num_workers = torch.get_num_threads()
        self._iterator = _start(self._loader)
        try:
            while (packed := self._next()) is not None:
                yield packed
        finally:
            self.stop()

    def _next(self) -> NDArray[np.uint8] | None:
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
            if result is None and self._cut.failure is not None:
                raise self._cut.failure
            return None if result is None else result[1][0]

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


def _start(loader: Any) -> Any:
    threads = torch.get_num_threads()
    try:
        return iter(loader)
    finally:
        torch.set_num_threads(threads)


def box_geometry(draws: ViewDraws) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The boxes of draws as the native library takes them: the filter sees nothing outside a box, as torchvision's."""
    return np.concatenate([draws.box, draws.box], axis=-1).astype(np.float64), draws.flip


class FfcvLoader:
    """`data_pipeline.batch.MultiCropLoader` over a beton, by FFCV."""

    def __init__(
        self,
        data: DataConfig,
        views: ViewsConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        global_batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._data, self._views, self._seed = data, views, seed
        self._rank, self._world_size, self._global_batch = rank, world_size, global_batch
        self._beton = open_beton(data.train)
        self._ids = subset(self._beton.size, data.limit)
        self.dataset_size = len(self._ids)
        self.steps_per_epoch = len(self._rank_batches(0))
        self._engine = Engine(data.workers)
        batch = global_batch // world_size
        self._cuts = FfcvCuts(
            self._beton, view_sizes(views), batch, self._engine, data.batches_ahead, data.batch_timeout_seconds
        )
        self._photometrics = Photometrics(views, device, dtype, self._engine)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch]:
        """The batches `start_step .. steps_per_epoch - 1` of an epoch, the same however it is entered."""
        ids = self._rank_batches(epoch)[start_step:]
        if not len(ids):
            return
        beton = self._beton

        def draws_of(batch: Int64Array) -> ViewDraws:
            return draw_views(self._views, self._seed, epoch, batch, beton.widths[batch], beton.heights[batch])

        packed_batches = self._cuts.batches(ids.reshape(-1), lambda batch: box_geometry(draws_of(batch)))
        try:
            for batch, packed in zip(ids, packed_batches, strict=True):
                views = self._photometrics(packed, draws_of(batch))
                yield ViewBatch(views, _tensor(batch), _tensor(beton.labels[batch]))
        finally:
            packed_batches.close()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Stops threads and frees buffers."""
        self._cuts.close()
        self._engine.close()

    def _rank_batches(self, epoch: int) -> Int64Array:
        order = epoch_order(self._seed, epoch, self.dataset_size, self._data.order)
        return self._ids[rank_batches(order, self._global_batch, self._rank, self._world_size)]


def _tensor(values: Int64Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=True))
