from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from data_pipeline.beton.convert import ConvertOptions, convert
from data_pipeline.config import CropConfig, DataConfig, ViewsConfig
from data_pipeline.loaders.batch import ViewBatch
from data_pipeline.loaders.build import build_eval_loader, build_loader
from data_pipeline.sampling.draws import draw_views

pytestmark = pytest.mark.filterwarnings("ignore:data.workers")

BACKENDS = ["ffcv", "torchvision"]


def make(path, views, *, backend="ffcv", workers=2, rank=0, world_size=1, global_batch=4, ahead=1, **more):
    data = DataConfig(train=path, backend=backend, workers=workers, batches_ahead=ahead, **more)
    return build_loader(data, views, seed=11, rank=rank, world_size=world_size, global_batch=global_batch)


def by_sample(loader, epoch=0) -> dict[int, list[torch.Tensor]]:
    """The views of each sample, copied at once."""
    found = {}
    for batch in loader.epoch(epoch):
        for i, sample in enumerate(batch.sample_ids.tolist()):
            found[sample] = [group[:, i].clone() for group in batch.views]
    loader.close()
    return found


def assert_same(a: dict[int, list[torch.Tensor]], b: dict[int, list[torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(x, y) for sample in a for x, y in zip(a[sample], b[sample], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_labels(beton, small_views, backend):
    loader = make(beton, small_views, backend=backend)
    assert (loader.dataset_size, loader.steps_per_epoch) == (24, 6)
    batches = list(loader.epoch(0))
    loader.close()
    assert len(batches) == 6
    for batch in batches:
        assert isinstance(batch, ViewBatch)
        assert [tuple(group.shape) for group in batch.views] == [(2, 4, 3, 40, 40), (3, 4, 3, 20, 20)]
        assert batch.views[0].dtype == torch.float32
        assert torch.equal(batch.labels, batch.sample_ids // 8)
    assert sorted(torch.cat([batch.sample_ids for batch in batches]).tolist()) == list(range(24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_sample_same_views_however_it_is_loaded(beton, small_views, backend):
    whole = by_sample(make(beton, small_views, backend=backend))
    assert_same(whole, by_sample(make(beton, small_views, backend=backend, global_batch=3, workers=1, ahead=3)))
    ranks: dict[int, list[torch.Tensor]] = {}
    for rank in range(2):
        ranks |= by_sample(make(beton, small_views, backend=backend, rank=rank, world_size=2))
    assert_same(whole, ranks)
    other_epoch = by_sample(make(beton, small_views, backend=backend), epoch=1)
    assert not torch.equal(other_epoch[0][0], whole[0][0])


def test_batches_are_not_overwritten(beton, small_views):
    """Batches kept for a whole epoch, and read by two networks, must not change while FFCV reuses its ring buffer."""
    loader = make(beton, small_views, global_batch=2)
    kept = list(loader.epoch(0))
    fresh = [[group.clone() for group in batch.views] for batch in loader.epoch(0)]
    loader.close()
    assert len(kept) == 12
    for batch, copies in zip(kept, fresh, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch.views, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_inside_an_epoch(beton, small_views, backend):
    loader = make(beton, small_views, backend=backend)
    whole = list(loader.epoch(2))
    interrupted = loader.epoch(2)
    next(interrupted)
    interrupted.close()
    rest = list(loader.epoch(2, start_step=4))
    assert len(rest) == 2
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    assert list(loader.epoch(2, start_step=6)) == []
    loader.close()


def test_threads_end_with_the_epoch(beton, small_views):
    before = set(threading.enumerate())  # some of an earlier test may be on their way out
    loader = make(beton, small_views)
    for _ in range(3):
        batches = loader.epoch(0)
        next(batches)
        batches.close()
    list(loader.epoch(1))
    assert not set(threading.enumerate()) - before
    loader.close()


def test_torch_threads_are_left_alone(beton, small_views):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = make(beton, small_views, workers=1)
        list(loader.epoch(0))
        assert torch.get_num_threads() == 2
        loader.close()
    finally:
        torch.set_num_threads(threads)


def test_two_loaders_at_once(beton, small_views):
    expected = by_sample(make(beton, small_views))
    first, second = make(beton, small_views), make(beton, small_views, global_batch=4)
    for a, b in zip(first.epoch(0), second.epoch(0), strict=True):
        for i, sample in enumerate(a.sample_ids.tolist()):
            assert torch.equal(a.views[0][:, i], expected[sample][0])
        assert torch.equal(a.views[1], b.views[1])
    first.close()
    second.close()


@pytest.mark.parametrize("mode", ["original", "raw"])
def test_backends_cut_the_same_views_from_imagenet(imagenet_folder, tmp_path, mode):
    plain = CropConfig(count=2, size_px=224, area_scale=(0.25, 1.0), blur_probability=(0.0,))
    views = ViewsConfig(
        global_crops=plain,
        local_crops=CropConfig(count=8, size_px=96, area_scale=(0.05, 0.25), blur_probability=(0.0,)),
        jitter={"probability": 0.0},
        grey_probability=0.0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    path = tmp_path / "imagenet.beton"
    convert([imagenet_folder], path, ConvertOptions(mode=mode, max_resolution=None if mode == "original" else 400))
    fast, slow = by_sample(make(path, views)), by_sample(make(path, views, backend="torchvision"))
    differences = [
        (x - y).abs().mean(dim=(-3, -2, -1)) * 255
        for sample in fast
        for x, y in zip(fast[sample], slow[sample], strict=True)
    ]
    every = torch.cat(differences)
    assert every.max() < 3.0
    assert every.mean() < 1.0
    if mode == "raw":  # the same pixels go in: only rounding differs
        assert every.max() < 0.5


def test_backends_change_colours_alike(imagenet_folder, tmp_path):
    views = ViewsConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    path = tmp_path / "imagenet.beton"
    convert([imagenet_folder], path, ConvertOptions(mode="jpg", max_resolution=300, quality=95))
    fast, slow = by_sample(make(path, views)), by_sample(make(path, views, backend="torchvision"))
    every = torch.cat(
        [
            (x - y).abs().mean(dim=(-3, -2, -1)) * 255
            for sample in fast
            for x, y in zip(fast[sample], slow[sample], strict=True)
        ]
    )
    assert every.mean() < 2.0
    assert every.max() < 6.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_limit_takes_every_class(beton, small_views, backend):
    loader = make(beton, small_views, backend=backend, limit=12)
    assert (loader.dataset_size, loader.steps_per_epoch) == (12, 3)
    labels = torch.cat([batch.labels for batch in loader.epoch(0)])
    loader.close()
    assert len(labels.unique()) == 3


def test_folder_and_beton_are_the_same_data_set(picture_folder, beton, small_views):
    a = by_sample(make(picture_folder, small_views, backend="torchvision"))
    assert_same(a, by_sample(make(beton, small_views, backend="torchvision")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(beton, small_views, dtype):
    data = DataConfig(train=beton, workers=1)
    loader = build_loader(data, small_views, seed=11, rank=0, world_size=1, global_batch=4, dtype=dtype)
    expected = by_sample(make(beton, small_views))
    for batch in loader.epoch(0):
        for i, sample in enumerate(batch.sample_ids.tolist()):
            assert torch.equal(batch.views[0][:, i], expected[sample][0].to(dtype))
    loader.close()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_sees_every_sample_once_in_order(beton, world_size):
    seen = []
    for rank in range(world_size):
        loader = evaluation(beton, "ffcv", rank=rank, world_size=world_size)
        assert (loader.dataset_size, loader.num_classes) == (24, 3)
        seen += [sample for batch in loader for sample in batch.sample_ids.tolist()]
    assert seen == list(range(24))


def test_evaluation_backends_agree(beton):
    fast, slow = (list(evaluation(beton, backend)) for backend in BACKENDS)
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.labels, b.labels)
        assert (a.images - b.images).abs().mean() * 255 < 1.5


def evaluation(path, backend, **more):
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "batch_size": 5, "workers": 2}
    return build_eval_loader(path, backend=backend, resize_px=48, crop_px=40, **plain, **more)


def test_more_workers_than_cores_is_a_warning(beton, small_views):
    with pytest.warns(UserWarning, match="share"):
        make(beton, small_views, workers=300).close()


def test_draws_follow_the_stored_size(beton, small_views):
    # both backends draw from the size of the stored image: a box always lies inside
    draws = draw_views(small_views, 11, 0, np.arange(4), np.full(4, 33), np.full(4, 20))
    assert (draws.box[..., 0] + draws.box[..., 2]).max() <= 33
