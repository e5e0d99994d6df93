from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mokd.evaluation import knn


def blobs(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = centers[labels] + 1.5 * torch.randn(count, 12, generator=generator)
    return torch.nn.functional.normalize(features, dim=1), labels


@pytest.mark.parametrize("k", [1, 10, 30])
def test_predictions_equal_scikit_learn_with_the_same_weights(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "BLOCK", 64)  # many blocks, the last one not full
    monkeypatch.setattr(knn, "TEST_BLOCK", 70)
    (train, labels), (test, test_labels) = blobs(700, 5, 1), blobs(300, 5, 2)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1.0 - distance) / 0.07)
    ).fit(train.numpy(), labels.numpy())
    (ours,) = knn.classify(knn.blocks_of(train), labels, test, [k], 0.07, 5)
    assert np.array_equal(ours[:, 0].numpy(), theirs.predict(test.numpy()))
    assert (ours[:, 0] == test_labels).double().mean() == theirs.score(test.numpy(), test_labels.numpy())
    assert ours.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 300


def test_equally_similar_images_are_taken_in_the_order_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    train = torch.eye(4)[[1, 0, 0, 2, 0, 0, 0, 3, 0]]
    for size in (2, 3, 100):
        monkeypatch.setattr(knn, "BLOCK", size)
        sims, rows = knn.nearest(knn.blocks_of(train), torch.eye(4)[:2], 4)
        assert rows.tolist() == [[1, 2, 4, 5], [0, 1, 2, 3]]
        assert sims.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_equal_scores_go_to_the_smaller_class() -> None:
    labels = torch.tensor([3, 1, 2, 0])
    train, test = torch.eye(8)[[0, 0, 0, 5]], torch.eye(8)[:1]
    (ours,) = knn.classify(knn.blocks_of(train), labels, test, [3], 0.07, 6)
    assert ours.tolist() == [[1, 2, 3, 0, 4]]


def test_top5_holds_the_five_highest_scores() -> None:
    (train, labels), (test, _) = blobs(900, 9, 1), blobs(50, 9, 2)
    sims, rows = knn.nearest(knn.blocks_of(train), test, 20)
    (ours,) = knn.classify(knn.blocks_of(train), labels, test, [20], 0.07, 9)
    scores = torch.zeros(50, 9, dtype=torch.float64)
    for i in range(50):
        for sim, row in zip(sims[i], rows[i], strict=True):
            scores[i, labels[row]] += np.exp(float(sim) / 0.07)
    expected = scores.topk(5, dim=1)
    found = scores.gather(1, ours)
    torch.testing.assert_close(found, expected.values)


def test_most_voted_classes_are_those_of_a_stable_sort() -> None:
    scores = torch.randint(0, 4, (200, 12), generator=torch.Generator().manual_seed(0)).double()
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :5]
    assert torch.equal(knn.most_voted(scores, 5), expected)
