from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from data_pipeline.config import ViewsConfig
from data_pipeline.sampling.draws import draw_views, view_sizes

N = 20_000
VIEWS = ViewsConfig()


@pytest.fixture(scope="module")
def draws():
    return draw_views(VIEWS, 7, 3, np.arange(N), np.full(N, 500), np.full(N, 375))


def test_pure_and_independent_of_company(draws):
    ids = np.array([17, 5, 1234])
    again = draw_views(VIEWS, 7, 3, ids, np.full(3, 500), np.full(3, 375))
    for name in ("box", "flip", "jitter", "order", "factor", "grey", "blur", "solarize"):
        assert np.array_equal(getattr(again, name), getattr(draws, name)[ids]), name
    for seed, epoch in ((8, 3), (7, 4)):
        other = draw_views(VIEWS, seed, epoch, ids, np.full(3, 500), np.full(3, 375))
        assert not np.array_equal(other.box, again.box)


def test_known_values():
    # a change here changes what every earlier run would have seen
    first = draw_views(VIEWS, 0, 0, [0], [500], [375])
    assert first.box[0, 0].tolist() == [113, 24, 250, 297]
    assert first.flip[0].tolist() == [True, False, True, False, False, True, True, True, True, False]


@pytest.mark.parametrize(("view", "scale"), [(0, (0.25, 1.0)), (5, (0.05, 0.25))])
def test_boxes_have_torchvisions_distribution(draws, view, scale):
    torch.manual_seed(0)
    image = Image.new("L", (500, 375))
    reference = np.array([RandomResizedCrop.get_params(image, scale, VIEWS.aspect_ratio) for _ in range(N)])
    top, left, height, width = reference.T
    mine = draws.box[:, view].astype(np.float64)
    for ours, theirs in (
        (mine[:, 2] * mine[:, 3], width * height),
        (mine[:, 2] / mine[:, 3], width / height),
        (mine[:, 0], left),
        (mine[:, 1], top),
    ):
        quantiles = np.linspace(0.02, 0.98, 25)
        spread = theirs.std()
        assert np.abs(np.quantile(ours, quantiles) - np.quantile(theirs, quantiles)).max() < 0.06 * spread
        assert abs(ours.mean() - theirs.mean()) < 4 * spread * (2 / N) ** 0.5
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= 500).all()
    assert (mine[:, 1] + mine[:, 3] <= 375).all()


def test_probabilities_and_ranges(draws):
    def near(values, expected):
        assert abs(np.mean(values) - expected) < 4 * (0.25 / values.size) ** 0.5

    near(draws.flip, 0.5)
    near(draws.jitter, 0.8)
    near(draws.grey, 0.2)
    assert (draws.blur[:, 0] > 0).all()
    near(draws.blur[:, 1] > 0, 0.1)
    near(draws.blur[:, 2:] > 0, 0.5)
    near(draws.solarize[:, 1], 0.2)
    assert not draws.solarize[:, [0, *range(2, 10)]].any()
    for operation, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        factor = draws.factor[..., operation]
        assert low <= factor.min() < low + 0.001 * (high - low) + 1e-6
        assert high >= factor.max() > high - 0.001 * (high - low) - 1e-6
        assert abs(factor.mean() - (low + high) / 2) < 0.005
    orders = draws.order.reshape(-1, 4)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts / len(orders) - 1 / 24).max() < 0.002
    radius = draws.blur[draws.blur > 0]
    assert radius.min() >= 0.1
    assert radius.max() <= 2.0
    assert abs(radius.mean() - 1.05) < 0.01


def test_draws_do_not_depend_on_each_other(draws):
    columns = np.stack(
        [
            draws.flip[:, 0],
            draws.flip[:, 1],
            draws.jitter[:, 0],
            draws.grey[:, 0],
            draws.box[:, 0, 0],
            draws.box[:, 1, 0],
        ]
    ).astype(np.float64)
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 0.04


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 400), (400, 1), (3, 5), (2000, 30)])
def test_extreme_images_get_boxes_inside(width, height):
    box = draw_views(VIEWS, 0, 0, np.arange(200), np.full(200, width), np.full(200, height)).box
    assert (box[..., 2:] >= 1).all()
    assert (box[..., :2] >= 0).all()
    assert (box[..., 0] + box[..., 2] <= width).all()
    assert (box[..., 1] + box[..., 3] <= height).all()


def test_view_sizes():
    assert view_sizes(VIEWS).tolist() == [224] * 2 + [96] * 8
