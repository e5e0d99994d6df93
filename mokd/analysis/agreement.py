"""On how many images two classifiers agree, and who is right where they do not."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.sampling.order import Int64Array


@dataclass(frozen=True)
class Agreement:
    """Shares of images, 0 to 1. The four last sum to 1, and `agree = both_right + both_wrong_alike`."""

    agree: float
    both_wrong_alike: float
    both_right: float
    only_first: float
    only_second: float
    both_wrong: float


def agreement(first: Int64Array, second: Int64Array, labels: Int64Array) -> Agreement:
    """Of two predictions `[M]` of classes `[M]`."""
    right, also = first == labels, second == labels
    return Agreement(
        agree=float((first == second).mean()),
        both_wrong_alike=float(((first == second) & ~right).mean()),
        both_right=float((right & also).mean()),
        only_first=float((right & ~also).mean()),
        only_second=float((also & ~right).mean()),
        both_wrong=float((~right & ~also).mean()),
    )
