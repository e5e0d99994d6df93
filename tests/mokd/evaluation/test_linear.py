"""Linear probes agree with scikit-learn's logistic regression, trained to the end, on the same features."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from mokd.config.evaluation import LinearConfig
from mokd.evaluation.cache import CachedFeatures
from mokd.evaluation.linear import FeatureSource, Heads, Standardised, train_epoch

CPU = torch.device("cpu")
RATES = LinearConfig().rates


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, epochs: int) -> np.ndarray:
    """Predictions `[R, M]`."""
    features = CachedFeatures([train[:1000], train[1000:]])
    scale = Standardised(features)
    source = FeatureSource([scale], torch.from_numpy(labels), 256, 0, CPU)
    heads = Heads(RATES, train.shape[1], int(labels.max()) + 1, CPU)
    for epoch in range(epochs):
        train_epoch([heads], source, epoch, epochs)
    return heads.classify(scale(torch.from_numpy(test)))[:, :, 0].numpy()


def test_accuracy_is_that_of_a_converged_logistic_regression() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 9000)
    features = generator.normal(size=(6, 20))[labels] + generator.normal(size=(9000, 20)) * 1.5
    # as networks' features are: of very different scales, correlated, one of them constant
    mixed = np.eye(20) + 0.3 * generator.normal(size=(20, 20))
    features = features @ mixed * 10.0 ** generator.uniform(-3, 3, 20) + 5.0
    features[:, 3] = 1.0
    train, test = features[:5000].astype(np.float32), features[5000:].astype(np.float32)
    ours = (probe(train, labels[:5000], test, 100) == labels[5000:]).mean(axis=1)
    scale = Standardised(CachedFeatures([train]))
    ready = [scale(torch.from_numpy(part)).numpy() for part in (train, test)]
    theirs = LogisticRegression(C=1e4, max_iter=3000, tol=1e-6).fit(ready[0], labels[:5000])
    expected = theirs.score(ready[1], labels[5000:])
    assert 0.5 < expected < 0.95
    assert abs(ours.max() - expected) <= 0.003


def test_heads_at_once_are_the_heads_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 5, generator=generator), torch.randint(0, 3, (16,), generator=generator))] * 6
    together = Heads(RATES, 5, 3, CPU)
    for x, y in batches:
        together.step(x, y, 0.7)
    for i, rate in enumerate(RATES):
        if rate > 1.0:
            continue  # far from where it converges, where rounding grows
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 0.7, momentum=0.9)
        for x, y in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
        torch.testing.assert_close(together.logits(batches[0][0])[:, i], layer(batches[0][0]))


def test_first_weights_are_those_of_the_published_probes_where_a_seed_is_given() -> None:
    heads, again, other = (Heads(RATES, 400, 50, CPU, seed) for seed in (1, 1, 2))
    weight = heads.state_tensors()["weight"]  # [R, D + 1, C]
    assert abs(weight[0, :-1].std().item() - 0.01) < 2e-4
    assert not weight[:, -1].any()
    assert all(torch.equal(weight[0], one) for one in weight)  # rates differ in nothing else
    assert torch.equal(heads.weight, again.weight)
    assert not torch.equal(heads.weight, other.weight)
    assert not Heads(RATES, 400, 50, CPU).weight.any()
