"""CKA and RankMe: cases by hand, the definitions written out, scikit-learn's and SciPy's parts of them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.preprocessing import KernelCenterer

from mokd.analysis.agreement import agreement
from mokd.analysis.feature_pca import color_maps, principal_components
from mokd.analysis.similarity import cka_matrix, gram, rank_me
from mokd.monitoring.statistics import linear_cka


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al., the definition of the unbiased estimate: over all quadruples of different images."""
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(len(k)), 4)]
    return float(np.mean(terms))


def test_cka_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 5, generator=generator)
    b = torch.cat([a[:, :2], torch.randn(7, 6, generator=generator)], dim=1)
    k, m = gram(a), gram(b)
    assert linear_cka(k, m) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), rel=1e-9)


def test_cka_by_hand() -> None:
    # products of which all pairs are 1 within {0, 1} and {2, 3}, and 0 between; against the pairing {0, 2}, {1, 3}
    k = np.kron(np.eye(2), np.ones((2, 2)))
    other = np.kron(np.ones((2, 2)), np.eye(2))
    # equation 5 with n = 4: tr(KL) = 0 or 4 without diagonals, sums 4 and 4, row products 1: (t + 16/6 - 2 * 4 / 2) / 4
    assert linear_cka(k, k) == pytest.approx(1.0)
    assert linear_cka(k, other) == pytest.approx((0 + 16 / 6 - 4) / (4 + 16 / 6 - 4))


def test_cka_of_many_images_is_that_of_centered_kernels() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1500, 4, generator=generator)
    b = torch.cat([a[:, :2], torch.randn(1500, 2, generator=generator)], dim=1)
    centered = [KernelCenterer().fit_transform(gram(x)) for x in (a, b)]
    biased = (centered[0] * centered[1]).sum() / np.linalg.norm(centered[0]) / np.linalg.norm(centered[1])
    assert linear_cka(gram(a), gram(b)) == pytest.approx(biased, abs=5e-3)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    matrix = cka_matrix({"a": gram(a), "b": gram(b)}, {"turned": gram(3.0 * a @ rotation + 5.0)})
    assert matrix[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert matrix[1, 0] == pytest.approx(linear_cka(gram(b), gram(a)), abs=1e-6)


def test_rank_me_by_hand() -> None:
    assert rank_me(torch.eye(6)) == pytest.approx(6.0)
    assert rank_me(torch.ones(5, 3)) == pytest.approx(1.0)
    # singular values 3 and 1: exp(0.75 ln(4/3) + 0.25 ln 4)
    assert rank_me(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_rank_me_is_scipys_entropy_of_numpys_singular_values(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    spectrum = np.linalg.svd(features.double().numpy(), compute_uv=False)
    assert rank_me(features) == pytest.approx(np.exp(entropy(spectrum)), rel=1e-6)


def test_agreement_by_hand_and_by_scikit_learn() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 2, 2])
    first = np.array([0, 0, 1, 0, 1, 1, 0, 2])
    second = np.array([0, 1, 1, 1, 1, 0, 0, 0])
    found = agreement(first, second, labels)
    assert found.agree == accuracy_score(first, second) == 4 / 8
    assert (found.both_right, found.only_first, found.only_second, found.both_wrong) == (2 / 8, 2 / 8, 1 / 8, 3 / 8)
    assert found.both_wrong_alike == 2 / 8
    table = confusion_matrix(first == labels, second == labels) / 8
    assert table.tolist() == [[found.both_wrong, found.only_second], [found.only_first, found.both_right]]


def test_principal_components_are_scikit_learns() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    theirs = PCA(3, svd_solver="full").fit(rows.double().numpy())
    projected, shares = principal_components(rows, 3)
    expected = theirs.transform(rows.double().numpy())
    signs = np.sign((expected * projected.numpy()).sum(axis=0))
    assert np.allclose(projected.numpy(), signs * expected, atol=1e-8)
    assert np.allclose(shares.numpy(), theirs.explained_variance_ratio_)
    colors, _ = color_maps(torch.randn(2, 16, 6))
    assert colors.shape == (2, 4, 4, 3)
    assert (colors.min(), colors.max()) == (0.0, 1.0)
