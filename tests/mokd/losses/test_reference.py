"""The reference itself: cases small enough for paper, and sums written out number by number without torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mokd.losses import reference

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
T = 0.1


def student(*views: list[float]) -> Tensor:
    """Logits `[V, 1, K]` of one image, given as they are after division by the temperature."""
    return T * torch.tensor(views, dtype=torch.float64).unsqueeze(1)


def targets(*views: list[float]) -> Tensor:
    return torch.tensor(views, dtype=torch.float64).unsqueeze(1)


def test_targets_are_centred_then_sharpened_and_detached() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    center = torch.tensor([1.0, 2.0, 3.0 - 0.5 * LN2], dtype=torch.float64)
    found = reference.teacher_targets(logits, center, 0.5)  # 0, 0 and ln 2 after division
    assert found.tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert not found.requires_grad
    uncentred = reference.teacher_targets(T * torch.tensor([0.0, LN3]), None, T)
    assert uncentred.tolist() == pytest.approx([0.25, 0.75])


def test_a_view_is_never_compared_with_itself() -> None:
    # views 0 and 1 give probabilities (1/4, 3/4) and (1/2, 1/2); view 2 (3/4, 1/4)
    logits = student([0.0, LN3], [0.0, 0.0], [LN3, 0.0])
    p = targets([1.0, 0.0], [0.0, 1.0])
    # target 0 meets views 1 and 2: ln 2, ln 4/3; target 1 meets views 0 and 2: ln 4/3, ln 4
    expected = (LN2 + (LN4 - LN3) + (LN4 - LN3) + LN4) / 4
    assert reference.paired_cross_entropy(logits, p, T).item() == pytest.approx(expected, rel=1e-12)


def test_rows_meet_their_own_target_only() -> None:
    logits = student([0.0, LN3], [LN3, 0.0])
    p = targets([0.0, 1.0], [0.5, 0.5])
    expected = ((LN4 - LN3) + 0.5 * (LN4 - LN3) + 0.5 * LN4) / 2
    assert reference.row_cross_entropy(logits, p, T).item() == pytest.approx(expected, rel=1e-12)


def test_pairs_and_rows_equal_sums_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    views, teachers, batch, count = 4, 2, 3, 5
    s = torch.randn(views, batch, count, generator=generator, dtype=torch.float64)
    p = torch.softmax(torch.randn(teachers, batch, count, generator=generator, dtype=torch.float64), dim=-1)

    def entropy(target: list[float], logits: list[float]) -> float:
        norm = math.log(sum(math.exp(z / T) for z in logits))
        return -sum(share * (z / T - norm) for share, z in zip(target, logits, strict=True))

    pairs = [
        entropy(p[q, b].tolist(), s[v, b].tolist())
        for q in range(teachers)
        for v in range(views)
        if v != q
        for b in range(batch)
    ]
    assert len(pairs) == (teachers * views - teachers) * batch
    assert reference.paired_cross_entropy(s, p, T).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)
    rows = [entropy(p[v, b].tolist(), s[v, b].tolist()) for v in range(teachers) for b in range(batch)]
    assert reference.row_cross_entropy(s[:teachers], p, T).item() == pytest.approx(sum(rows) / len(rows), rel=1e-9)


def test_the_four_terms_take_what_the_table_says() -> None:
    def says(mlp: float, t_head: float) -> reference.BranchLogits:
        """Teachers so sure that they point at prototype 0, unless their centre says otherwise."""
        teacher = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 1, 2)
        centers = [torch.tensor([shift, 0.0], dtype=torch.float64) for shift in (mlp, t_head)]
        students = student([0, LN3], [0, LN3], [0, 0]), student([0, 0], [0, 0], [0, 0])
        return reference.BranchLogits(*students, teacher, teacher, *centers)

    own, other = says(0.0, 0.0), says(2.0, 2.0)  # the other's centre turns its targets over
    found = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    sure = {"own_temperature": 1e-3, "cross_temperature": 1e-3}
    expected = {
        "self_mlp": (2 * LN4 + 2 * LN2) / 4,  # each teacher view meets the other global view, and the local one
        "self_thead": LN2,
        "cross_mlp": (2 * (LN4 - LN3) + 2 * LN2) / 4,
        "cross_search": LN2,
    }
    terms = reference.four_terms(own, [other], [found], **sure)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected)
    # the search's student is the local view's T-Head; its centre is taken away on request only
    leaning = own._replace(student_t_head=student([0, 0], [0, 0], [0, LN3]))
    assert reference.four_terms(leaning, [other], [found], **sure)["cross_search"].item() == pytest.approx(LN4)
    centred = reference.four_terms(leaning, [other], [found], **sure, center_search=True)["cross_search"]
    assert centred.item() == pytest.approx(LN4 - LN3)
    # alone there is nobody to learn from; of two others the mean counts
    assert set(reference.four_terms(own, [], [], **sure)) == {"self_mlp", "self_thead"}
    unlike = found.flip(-1)
    both = reference.four_terms(leaning, [other, other], [found, unlike], **sure)
    assert both["cross_search"].item() == pytest.approx((LN4 + LN4 - LN3) / 2)


def test_the_centre_moves_by_the_rest_of_its_momentum() -> None:
    teacher = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]])
    assert reference.next_center(torch.tensor([10.0, 0.0]), teacher, 0.9).tolist() == pytest.approx([9.2, 0.1])


def test_info_nce_of_three_negatives() -> None:
    q, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.8, 0.6]])
    logits = [x / 0.5 for x in (0.6, 0.0, -1.0, 0.8)]
    expected = math.log(sum(math.exp(x) for x in logits)) - logits[0]
    assert reference.info_nce(q, key, negatives, 0.5).tolist() == pytest.approx([expected])


def test_extraction_is_a_convolution_with_zeros_around_the_map() -> None:
    dense = torch.arange(1.0, 10.0).view(1, 9, 1)  # 1 to 9 on a map of 3 x 3
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 0, 1], kernel[0, 0, 1, 2] = 1.0, 10.0  # what is above, and ten times what is to the right
    found = reference.extraction(dense, kernel).view(3, 3)
    assert found.tolist() == [[20, 30, 0], [51, 62, 3], [84, 95, 6]]
    mixing = torch.zeros(2, 2, 3, 3)
    mixing[0, 1, 1, 1] = 1.0  # the first channel out is the second one in
    assert reference.extraction(torch.tensor([[[3.0, 5.0]]]), mixing).tolist() == [[[5.0, 0.0]]]


def test_matching_and_alignment_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    extracted = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])  # cosines 1 and 0
    weights = reference.matching(query, extracted)
    first = math.e / (math.e + 1)
    assert weights.tolist()[0] == pytest.approx([first, 1 - first])
    assert not weights.requires_grad
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    x, y = 3 * (1 - first) + 0.5 * 0.6, 2 * first + 0.5 * 0.8
    key = reference.alignment(weights, extracted, torch.tensor([[0.6, 0.8]]), swap)
    assert key.tolist()[0] == pytest.approx([x / math.hypot(x, y), y / math.hypot(x, y)])
