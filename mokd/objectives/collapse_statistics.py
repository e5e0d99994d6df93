"""Signs of collapse, computed on the features of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from mokd.losses.kernels.targets import at_least_fp32


@torch.no_grad()
def feature_monitors(pooled: Tensor) -> dict[str, Tensor]:
    """Spread and effective rank of pooled features `[V, B, D]` of the first view on this rank.

    feature_std: mean over dimensions of the standard deviation of L2-normalised features (about 1/sqrt(D) when spread
    out, 0 when collapsed). feature_rank: exp of the entropy of the normalised singular values (RankMe), at most B.
    """
    features = torch.nn.functional.normalize(at_least_fp32(pooled[0].detach()), dim=-1)
    if features.shape[0] < 2:
        return {"feature_std": features.new_zeros(()), "feature_rank": features.new_ones(())}
    # singular values through the B x B Gram matrix: B is small, D is not
    spectrum = torch.linalg.eigvalsh(features @ features.T).clamp_min(0.0).sqrt()
    weights = spectrum / spectrum.sum().clamp_min(1e-12)
    rank = torch.special.entr(weights).sum().exp()
    return {"feature_std": features.std(dim=0).mean(), "feature_rank": rank}
