"""NormalFloat: weights as one of 2^k levels that are the quantiles of a normal distribution (arXiv:2305.14314)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share one scale, in the order of the rows."""
_OFFSET = 0.9677083
"""The largest quantile; the one that bitsandbytes takes."""
_BINS = 512
"""Two middles between levels of 8 bits are at least 0.0049 apart, more than a bin."""


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
def nearest(values: Tensor, bits: int) -> Tensor:
    """The number of the level that is nearest to each value; of two that are as near, the smaller one.

    What `torch.bucketize` gives at the middles between the levels, ten times as fast: [−1, 1] is cut into so many bins
    that none has two middles, and only the one in a value's own bin is compared with it.

    Args:
        values: of any shape; float32. NaN becomes any number.

    Returns:
        int32, of the same shape.
    """
    below, middle = (part.to(values.device) for part in _bins(bits))
    flat = values.reshape(-1)
    bins = _bin_of(flat)
    return below.index_select(0, bins).add_(flat > middle.index_select(0, bins)).view(values.shape)


def looked_up(codes: Tensor, bits: int) -> Tensor:
    """The level of each number that `nearest` gave."""
    return levels(bits).to(codes.device).index_select(0, codes.reshape(-1)).view(codes.shape)


def middles(bits: int) -> Tensor:
    """(2^bits − 1,): the values halfway between neighbouring levels."""
    table = levels(bits)
    return (table[1:] + table[:-1]) / 2


@lru_cache(maxsize=8)
def _bins(bits: int) -> tuple[Tensor, Tensor]:
    """For each bin how many middles lie in smaller ones, int32, and the middle in it, infinite where there is none."""
    found = middles(bits)
    places = _bin_of(found)
    assert len(set(places.tolist())) == len(places)
    middle = torch.full((_BINS + 1,), torch.inf)
    middle[places.long()] = found
    return torch.searchsorted(places, torch.arange(_BINS + 1, dtype=torch.int32)).to(torch.int32), middle


def _bin_of(flat: Tensor) -> Tensor:
    """Never falls as the value rises: a value in another bin than a middle lies on the same side of it as its bin."""
    half = float(_BINS // 2)
    return torch.add(half, flat, alpha=half).clamp_(0, _BINS).nan_to_num_(0.0).to(torch.int32)


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
    codes = nearest(blocks / torch.where(scale == 0, 1, scale), bits)
    found = (looked_up(codes, bits) * scale).view(-1)
    return found[: len(flat)].view(weight.shape)
