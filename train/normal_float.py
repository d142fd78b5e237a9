"""NormalFloat: weights as one of 2^k levels that are the quantiles of a normal distribution (arXiv:2305.14314)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share one scale, in the order of the rows."""
_OFFSET = 0.9677083
"""The largest quantile; the one that bitsandbytes takes."""


@lru_cache(maxsize=8)
def levels(bits: int) -> Tensor:
    """The 2^bits values, ascending from −1 to 1 with an exact 0; float32. One more is positive than negative."""
    half = 2 ** (bits - 1)
    left = torch.linspace(1 - _OFFSET, 0.5, half, dtype=torch.float64)[:-1]
    right = torch.linspace(0.5, _OFFSET, half + 1, dtype=torch.float64)
    quantiles: Tensor = torch.special.ndtri(torch.cat([left, right])) / torch.special.ndtri(right[-1])
    quantiles[half - 1] = 0.0
    return quantiles.to(torch.float32)


@torch.no_grad()
def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weights as they are after quantising and back.

    Every block of 64 is divided by its largest absolute value, and each weight goes to the nearest level. The last
    block may be shorter; a block of zeros stays.

    Args:
        weight: of any shape; computed in float32.

    Returns:
        float32, of the same shape.
    """
    flat = weight.to(torch.float32).reshape(-1)
    missing = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    table = levels(bits).to(weight.device)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / torch.where(scale == 0, 1, scale), middles)
    found = (table[codes] * scale).view(-1)
    return found[: len(flat)].view(weight.shape)
