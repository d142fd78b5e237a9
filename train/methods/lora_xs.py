"""LoRA-XS (arXiv:2405.17604)."""

from __future__ import annotations

import torch
from torch import Tensor

from train.methods.three_factor import ThreeFactorMethod, ThreeFactors
from train.options.three_factor import LoraXsOptions
from train.truncated_svd import truncated_svd

DEVIATION = 1e-5


class LoraXs(ThreeFactorMethod[LoraXsOptions]):
    """B and A are the leading singular vectors of W, A times the singular values; R starts near 0 and is trained."""

    def start(self, path: str, weight: Tensor) -> ThreeFactors:
        rank = self.options.rank
        u, s, vt = truncated_svd(weight, rank, self.generator)
        r = torch.randn(rank, rank, generator=self.generator) * DEVIATION
        return ThreeFactors(A=s[:, None] * vt, R=r.to(weight.device), B=u)
