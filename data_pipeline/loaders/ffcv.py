"""The FFCV loader: order and draws are ours, pure functions of the epoch and the sample; FFCV runs the decoding."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import partial

import numpy as np
import torch

from data_pipeline.beton.samples import BetonSamples
from data_pipeline.config import DataConfig, ViewsConfig
from data_pipeline.core.host_memory import Packed
from data_pipeline.core.native_library import PHOTOMETRIC, Engine
from data_pipeline.loaders.batch import ViewBatch
from data_pipeline.loaders.delivery import make_delivery
from data_pipeline.loaders.ffcv_crops import CutPlan, EpochPlan, FfcvCuts
from data_pipeline.sampling.draws import draw_views, view_sizes
from data_pipeline.sampling.order import Int64Array, RankSampler
from data_pipeline.transforms.photometrics import check_views, pack_parameters


class FfcvLoader:
    """`data_pipeline.loaders.batch.MultiCropLoader` over a beton, by FFCV."""

    def __init__(
        self,
        data: DataConfig,
        views: ViewsConfig,
        samples: BetonSamples,
        sampler: RankSampler,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        check_views(views)
        self._views, self._beton, self._sampler = views, samples.beton, sampler
        self.dataset_size, self.steps_per_epoch = len(sampler.ids), sampler.steps_per_epoch
        self._engine = Engine(data.workers)
        self._deliver = make_delivery(views, device, dtype, self._engine)
        self._cuts = FfcvCuts(
            self._beton,
            view_sizes(views),
            sampler.global_batch // sampler.world_size,
            self._engine,
            data.batches_ahead,
            data.batch_timeout_seconds,
            parameter_bytes=views.count * PHOTOMETRIC.itemsize,
            pinned=device.type == "cuda",
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch]:
        """The batches `start_step .. steps_per_epoch - 1` of an epoch, the same however it is entered."""
        with closing(self.packed_epoch(epoch, start_step)) as packed:
            yield from self._deliver(packed)

    def packed_epoch(self, epoch: int, start_step: int = 0) -> Generator[Packed]:
        """The same before photometrics: what is sent to a GPU. A batch is valid until the next but one."""
        ids = self._sampler.epoch(epoch, start_step).reshape(-1)
        return self._cuts.batches(EpochPlan(ids, partial(self._plan_cuts, epoch)))

    def _plan_cuts(self, epoch: int, ids: Int64Array) -> CutPlan:
        sizes = self._beton.widths[ids], self._beton.heights[ids]
        draws = draw_views(self._views, self._sampler.seed, epoch, ids, *sizes)
        # the filter sees nothing outside a box, as torchvision's
        geometry = np.concatenate([draws.box, draws.box], axis=-1).astype(np.float64)
        return CutPlan(geometry, draws.flip, pack_parameters(draws).view(np.uint8))

    def close(self) -> None:
        """Stops threads and frees buffers."""
        self._cuts.close()
        self._engine.close()
