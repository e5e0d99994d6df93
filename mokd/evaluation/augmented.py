"""Training images for labelled training: one random resized crop and a flip per image, by the training loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data_pipeline.config import CropConfig, JitterConfig, ViewsConfig
from data_pipeline.core.errors import UserError
from data_pipeline.loaders.batch import MultiCropLoader
from data_pipeline.loaders.build import build_loader
from data_pipeline.sampling.order import Int64Array
from mokd.config import RunConfig
from mokd.distributed.process_group import Ranks, all_gather
from mokd.evaluation.data import LabelledSet
from mokd.evaluation.features import Read
from mokd.evaluation.linear import Batch
from mokd.models.backbones import Backbone


def one_view(config: RunConfig) -> ViewsConfig:
    """One crop of `evaluation.crop_px`, flipped every other time, with no change of colours."""
    section = config.evaluation
    crop = CropConfig(count=1, size_px=section.crop_px, area_scale=section.area_scale, blur_probability=(0.0,))
    return ViewsConfig(
        global_crops=crop,
        local_crops=crop.model_copy(update={"count": 0}),
        jitter=JitterConfig(probability=0.0),
        grey_probability=0.0,
        mean=config.views.mean,
        std=config.views.std,
    )


def batch_of(wanted: int, images: int, ranks: Ranks) -> int:
    """The global batch: what is wanted, but no more than there are images, in equal parts for the ranks. UserError."""
    batch = min(wanted, images) // ranks.world_size * ranks.world_size
    if batch < 2:  # BatchNorm has no variance over one image
        raise UserError(f"{images} images to train on are too few for {ranks.world_size} ranks; use a larger fraction")
    return batch


def labelled_loader(
    data: LabelledSet, ids: Int64Array, batch: int, config: RunConfig, ranks: Ranks, device: torch.device
) -> MultiCropLoader:
    """Shuffled batches of the samples `ids`, in an order and with crops that do not depend on the ranks."""
    section = config.data.model_copy(update={"train": data.path, "backend": data.backend, "limit": None})
    return build_loader(
        section,
        one_view(config),
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        global_batch=batch,
        device=device,
        ids=ids,
    )


class AugmentedSource:
    """`linear.Source`: features of fresh crops in every epoch, by networks that stay as they are."""

    def __init__(
        self, backbones: Sequence[Backbone], reads: Sequence[Read], loader: MultiCropLoader, device: torch.device
    ) -> None:
        self._pairs = list(zip([backbone.eval() for backbone in backbones], reads, strict=True))
        self._loader, self._device = loader, device
        self.steps = loader.steps_per_epoch

    @torch.no_grad()
    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch: every rank's images, on every rank."""
        for batch in self._loader.epoch(epoch):
            images = batch.views[0][0]
            features = [_all(read(backbone, images).float()) for backbone, read in self._pairs]
            yield features, _all(batch.labels.to(self._device))


def _all(rows: Tensor) -> Tensor:
    return all_gather(rows).flatten(0, 1)
