"""Entrywise rules: how N blocks of equal shape become one. Of whole matrices, core matrices, factors or rows alike.

Blocks are X: (N, rows, columns), weights (N,). Order of the blocks changes nothing but rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from merge.stack import Stack

Election = Literal["total", "frequency"]

SAMPLED_COLUMNS = 8
MASK_ROWS = 32
"""Rows whose random masks come from one draw. Part of what a seed means: another value gives other masks."""


def weighted_sum(X: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢXᵢ."""
    result: Tensor = torch.tensordot(weights.to(X.dtype), X, dims=1)
    return result


def elected_sum(X: Tensor, weights: Tensor, election: Election) -> Tensor:
    """Sum of the weighted entries that have the elected sign, divided by how many do (arXiv:2306.01708, PEFT's order).

    The sign is elected on the entries without their weights: that of their sum (total) or of most of them (frequency);
    0 elects plus. Zeros never agree.
    """
    majority = _majority(X if election == "total" else X.sign())
    agreeing = (X * majority).clamp_min_(0)
    total = weighted_sum(agreeing, weights) * majority
    return total / agreeing.sign_().sum(0).clamp_min_(1)


def elected_mean(X: Tensor, weights: Tensor, election: Election, *, normalize: bool) -> Tensor:
    """As mergekit: the sign is elected on the weighted entries, and the divisor is the weight of those that agree."""
    weighted = X * _broadcast(weights, X)
    majority = _majority(weighted if election == "total" else weighted.sign())
    agreeing = (weighted * majority).clamp_min_(0)
    total = agreeing.sum(0) * majority
    if not normalize:
        return total
    divisor = weighted_sum(agreeing.sign_(), weights)
    return total / torch.where(divisor == 0, 1.0, divisor)


def _majority(votes: Tensor) -> Tensor:
    return torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(votes.dtype)


def _broadcast(values: Tensor, X: Tensor) -> Tensor:
    return values.to(X.dtype).view(-1, *(1,) * (X.dim() - 1))


def kept_count(density: float, entries: int) -> int:
    """How many entries a density keeps: rounded down, as PEFT and mergekit do."""
    return int(density * entries)


def trimmed(X: Tensor, density: float) -> Tensor:
    """One block (rows, columns) with its largest |entries| kept, a `density` of all. Ties at the border all stay.

    (PEFT keeps an arbitrary choice among ties; keeping all makes the result a function of the values alone.)
    """
    kept = kept_count(density, X.numel())
    if kept >= X.numel():
        return X
    if kept == 0:
        return torch.zeros_like(X)
    return above(X, float(X.abs().flatten().kthvalue(X.numel() - kept + 1).values))


def above(X: Tensor, border: float) -> Tensor:
    """X where |X| ≥ border, else 0."""
    if border <= 0:
        return X
    # hardshrink is one pass, where a product with a mask is three; it keeps what lies strictly above
    below = torch.nextafter(torch.tensor(border, dtype=X.dtype), torch.tensor(0.0, dtype=X.dtype))
    return torch.nn.functional.hardshrink(X, float(below))


def dropped(X: Tensor, density: float, seed: int, first_row: int = 0) -> Tensor:
    """One block (rows, columns) with each entry kept with probability `density` and divided by it (arXiv:2311.03099).

    `first_row`, a multiple of `MASK_ROWS`, is the block's place in its matrix: masks do not depend on how it is cut.
    """
    if density >= 1:
        return X
    uniform = uniform_rows(seed, first_row, X.shape[0], X.shape[1]).to(X.device)
    return X * (uniform < density) / density


def uniform_rows(seed: int, first_row: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32 uniform numbers in [0, 1) of the rows from `first_row` on."""
    draws = [
        np.random.Generator(np.random.SFC64([seed, row])).random((min(MASK_ROWS, rows - start), columns), np.float32)
        for start in range(0, rows, MASK_ROWS)
        for row in (first_row + start,)
    ]
    return torch.from_numpy(draws[0] if len(draws) == 1 else np.concatenate(draws))


def seeds(stack: Stack, seed: int) -> Sequence[int]:
    """A seed for each owner, in the order of `Stack.members`, from `seed` and the owner's numbers in this module.

    So masks differ between adapters and between modules, and do not depend on the order of a request.
    """
    columns = torch.linspace(0, stack.A.shape[1] - 1, SAMPLED_COLUMNS).long().to(stack.A.device)
    rows = torch.linspace(0, stack.B.shape[0] - 1, SAMPLED_COLUMNS).long().to(stack.B.device)
    found: list[int] = []
    for _, own in stack.members:
        digest = hashlib.sha256(seed.to_bytes(8, "big"))
        digest.update(stack.A[own][:, columns].cpu().numpy().tobytes())
        digest.update(stack.B[rows][:, own].cpu().numpy().tobytes())
        value = int.from_bytes(digest.digest()[:8], "big")
        # equal copies must not be masked alike
        while value in found:
            value += 1
        found.append(value)
    return found
