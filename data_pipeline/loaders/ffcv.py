"""The FFCV loader: order and draws are ours, pure functions of the epoch and the sample; FFCV runs the decoding."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from data_pipeline.beton.format import open_beton
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.core.host_memory import Packed
from data_pipeline.core.native_library import PHOTOMETRIC, Engine
from data_pipeline.loaders.batch import ViewBatch
from data_pipeline.loaders.delivery import make_delivery
from data_pipeline.loaders.ffcv_crops import CutPlan, FfcvCuts
from data_pipeline.sampling.draws import draw_views, view_sizes
from data_pipeline.sampling.order import Int64Array, epoch_order, rank_batches, subset
from data_pipeline.transforms.photometrics import check_views, pack_parameters


class FfcvLoader:
    """`data_pipeline.loaders.batch.MultiCropLoader` over a beton, by FFCV."""

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
        ids: Int64Array | None = None,
    ) -> None:
        check_views(views)
        self._data, self._views, self._seed = data, views, seed
        self._rank, self._world_size, self._global_batch = rank, world_size, global_batch
        self._beton = open_beton(data.train)
        self._ids = subset(self._beton.size, data.limit) if ids is None else ids
        self.dataset_size = len(self._ids)
        self.steps_per_epoch = len(self._rank_batches(0))
        self._engine = Engine(data.workers)
        self._deliver = make_delivery(views, device, dtype, self._engine)
        self._cuts = FfcvCuts(
            self._beton,
            view_sizes(views),
            global_batch // world_size,
            self._engine,
            data.batches_ahead,
            data.batch_timeout_seconds,
            parameter_bytes=views.count * PHOTOMETRIC.itemsize,
            pinned=device.type == "cuda",
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch]:
        """The batches `start_step .. steps_per_epoch - 1` of an epoch, the same however it is entered."""
        ids = self._rank_batches(epoch)[start_step:]
        with closing(self.packed_epoch(epoch, start_step)) as packed:
            for batch, views in zip(ids, self._deliver(packed), strict=True):
                yield ViewBatch(views, _tensor(batch), _tensor(self._beton.labels[batch]))

    def packed_epoch(self, epoch: int, start_step: int = 0) -> Generator[Packed]:
        """The same before photometrics: what is sent to a GPU. A batch is valid until the next but one."""
        ids = self._rank_batches(epoch)[start_step:]
        if not len(ids):
            return
        beton = self._beton

        def plan(batch: Int64Array) -> CutPlan:
            sizes = beton.widths[batch], beton.heights[batch]
            draws = draw_views(self._views, self._seed, epoch, batch, *sizes)
            # the filter sees nothing outside a box, as torchvision's
            geometry = np.concatenate([draws.box, draws.box], axis=-1).astype(np.float64)
            return CutPlan(geometry, draws.flip, pack_parameters(draws).view(np.uint8))

        with closing(self._cuts.batches(ids.reshape(-1), plan)) as batches:
            yield from batches

    def close(self) -> None:
        """Stops threads and frees buffers."""
        self._cuts.close()
        self._engine.close()

    def _rank_batches(self, epoch: int) -> Int64Array:
        order = epoch_order(self._seed, epoch, self.dataset_size, self._data.order)
        return self._ids[rank_batches(order, self._global_batch, self._rank, self._world_size)]


def _tensor(values: Int64Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=True))
