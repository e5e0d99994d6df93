"""Evaluation batches from a beton by FFCV: the centre of each image is one more cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data_pipeline.beton.samples import BetonSamples
from data_pipeline.core.errors import UserError
from data_pipeline.core.native_library import Engine
from data_pipeline.loaders.batch import LabelledBatch
from data_pipeline.loaders.evaluation import EvalPlan, centre_geometry
from data_pipeline.loaders.ffcv_crops import CutPlan, EpochPlan, FfcvCuts
from data_pipeline.sampling.order import Int64Array

_AHEAD = 2
_TIMEOUT_SECONDS = 120.0


def ffcv_eval_batches(plan: EvalPlan) -> Iterator[LabelledBatch]:
    """The batches of a plan; threads and buffers live as long as the iteration."""
    if not isinstance(plan.samples, BetonSamples):
        raise UserError("evaluation: backend ffcv reads betons; convert the folder, or use backend torchvision")
    if not len(plan.ids):
        return
    beton = plan.samples.beton
    engine = Engine(plan.workers)
    size = np.array([plan.crop_px], np.int32)
    batch_size = min(plan.batch_size, len(plan.ids))
    cuts = FfcvCuts(beton, size, batch_size, engine, _AHEAD, _TIMEOUT_SECONDS)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (plan.mean, plan.std))

    def centres(ids: Int64Array) -> CutPlan:
        boxes = centre_geometry(beton.widths[ids], beton.heights[ids], plan.resize_px, plan.crop_px)
        return CutPlan(boxes, np.zeros((len(ids), 1), np.bool_), np.empty((len(ids), 0), np.uint8))

    try:
        for packed in cuts.batches(EpochPlan(plan.ids, centres)):
            pixels = torch.from_numpy(packed.crops).view(-1, beton.channels, plan.crop_px, plan.crop_px)
            images = (pixels.float() / 255.0 - mean) / std  # new memory: the ring goes on
            yield LabelledBatch(images, packed.sample_ids, packed.labels)
    finally:
        cuts.close()
        engine.close()
