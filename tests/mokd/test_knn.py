from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from data_pipeline.errors import UserError
from mokd.evaluation.knn import evaluate, nearest, vote

CPU = torch.device("cpu")


def blobs(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = centers[labels] + 1.5 * torch.randn(count, 12, generator=generator)
    return torch.nn.functional.normalize(features, dim=1), labels


@pytest.mark.parametrize("k", [1, 10, 30])
def test_predictions_equal_scikit_learn_with_the_same_weights(k: int) -> None:
    train, test = blobs(700, 5, 1), blobs(300, 5, 2)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1.0 - distance) / 0.07)
    ).fit(train[0].numpy(), train[1].numpy())
    sims, rows = nearest(train[0], test[0], k)
    ours = vote(sims, train[1][rows], k, 5, 0.07).argmax(dim=1)
    assert np.array_equal(ours.numpy(), theirs.predict(test[0].numpy()))
    (result,) = evaluate(train, test, [k], 0.07, CPU)
    assert result.top1 == pytest.approx(100 * theirs.score(test[0].numpy(), test[1].numpy()))
    assert result.top5 >= result.top1


def test_more_neighbours_than_images_and_one_class() -> None:
    train, test = blobs(7, 3, 1), blobs(20, 3, 2)
    (result,) = evaluate(train, test, [30], 0.07, CPU)
    assert 0.0 <= result.top1 <= 100.0
    one = (train[0], torch.zeros_like(train[1]))
    (result,) = evaluate(one, (test[0], torch.zeros_like(test[1])), [5], 0.07, CPU)
    assert result.top1 == 100.0


def test_what_cannot_be_evaluated_is_named() -> None:
    train, test = blobs(20, 3, 1), blobs(20, 3, 2)
    with pytest.raises(UserError, match="without label"):
        evaluate(train, (test[0], torch.full_like(test[1], -1)), [5], 0.07, CPU)
    broken = test[0].clone()
    broken[4] = torch.nan
    with pytest.raises(UserError, match="image 4 are not finite"):
        evaluate(train, (broken, test[1]), [5], 0.07, CPU)
    empty = (torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match="no labelled images"):
        evaluate(empty, test, [5], 0.07, CPU)
