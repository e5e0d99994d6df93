"""The way of a batch from host memory to normalised views on its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import ViewsConfig
from data_pipeline.core.host_memory import Packed
from data_pipeline.core.native_library import PHOTOMETRIC, Engine
from data_pipeline.core.triton_support import why_no_triton
from data_pipeline.loaders.batch import ViewBatch
from data_pipeline.transforms.photometrics import CpuPhotometrics, photometrics_torch

Delivery = Callable[[Iterator[Packed]], Iterator[ViewBatch]]


def make_delivery(views: ViewsConfig, device: torch.device, dtype: torch.dtype, engine: Engine) -> Delivery:
    """What turns packed batches into views on `device`."""
    if device.type == "cuda":
        return _OnGpu(views, device, dtype)
    if device.type == "cpu":
        make: Callable[[Packed], tuple[Tensor, ...]] = CpuPhotometrics(views, dtype, engine)
    else:

        def in_torch(packed: Packed) -> tuple[Tensor, ...]:
            crops = torch.from_numpy(packed.crops).to(device)
            return photometrics_torch(crops, views, packed.parameters.view(PHOTOMETRIC), dtype)

        make = in_torch

    return lambda batches: (ViewBatch(make(packed), packed.sample_ids, packed.labels) for packed in batches)


@dataclass(frozen=True)
class _Underway:
    batch: ViewBatch
    copied: Any  # CUDA events: the slot in host memory is free again; its views are made
    made: Any


class _OnGpu:
    """One pinned transfer per batch and its photometrics on a stream of their own, while the batch before is used."""

    def __init__(self, views: ViewsConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._fused = why_no_triton() is None and views.channels == 3
        self._views, self._device, self._dtype = views, device, dtype
        self._stream: Any = torch.cuda.Stream(device, priority=-1)  # short work that a whole step waits for

    def __call__(self, batches: Iterator[Packed]) -> Iterator[ViewBatch]:
        underway: deque[_Underway] = deque()
        for packed in batches:
            underway.append(self._send(packed))
            if len(underway) == 2:
                yield self._receive(underway.popleft())
        if underway:
            yield self._receive(underway.popleft())

    def _send(self, packed: Packed) -> _Underway:
        with torch.cuda.stream(self._stream):
            block = packed.block.to(self._device, non_blocking=True)
            copied = self._stream.record_event()
            crops = block[: packed.crops.size].view(packed.crops.shape)
            if self._fused:
                from data_pipeline.transforms.photometrics_triton import photometrics_triton

                parameters = block[packed.parameters_start :].view(packed.parameters.shape)
                views = photometrics_triton(crops, self._views, parameters, self._dtype)
            else:
                views = photometrics_torch(crops, self._views, packed.parameters.view(PHOTOMETRIC), self._dtype)
            batch = ViewBatch(views, packed.sample_ids, packed.labels)
            return _Underway(batch, copied, self._stream.record_event())

    def _receive(self, sent: _Underway) -> ViewBatch:
        # sent one step ago: the host does not wait here, unless the transfer is slower than a step
        sent.copied.synchronize()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent.made)
        for group in sent.batch.views:
            group.record_stream(current)
        return sent.batch
