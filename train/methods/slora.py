"""SLoRA (arXiv:2502.14482)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.init import kaiming_uniform_

from train.methods.three_factor import ALL, ThreeFactorMethod, ThreeFactors
from train.options.three_factor import SloraOptions


class Slora(ThreeFactorMethod[SloraOptions]):
    """A and R are random, as the authors' code has them, and B is 0, so that training begins at the base model."""

    trained = ALL

    def start(self, path: str, weight: Tensor) -> ThreeFactors:
        del path
        (d_out, d_in), rank = weight.shape, self.options.rank
        a, r = (
            kaiming_uniform_(torch.empty(rank, fan_in), a=math.sqrt(5), generator=self.generator)
            for fan_in in (d_in, rank)
        )
        return ThreeFactors(A=a, R=r, B=torch.zeros(d_out, rank))
