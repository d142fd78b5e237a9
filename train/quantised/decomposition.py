"""W ≈ Q + L1·L2 with Q in a few bits: algorithm 1 of arXiv:2311.12023."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from train.quantised.block_format import BlockFormat
from train.quantised.double_quantisation import rounded
from train.quantised.low_rank import LowRankFactors


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Q + L1·L2, float32.

    Attributes:
        left: L1, (d_out, r).
        right: L2, (r, d_in).
        quantised: W − L1·L2 of the last round that was better than the one before, which Q is the rounding of.
        error: ‖√F ∘ (W − Q − L1·L2)‖_F.
        trace: the error of every round that was computed, the one that ended it too.
        polished: whether L1·L2 was fitted to Q once more at the end.
    """

    left: Tensor
    right: Tensor
    quantised: Tensor
    error: float
    trace: tuple[float, ...]
    polished: bool


@torch.no_grad()
def decompose(
    weight: Tensor,
    form: BlockFormat,
    factors: LowRankFactors,
    *,
    iterations: int,
    rtol: float = 0.0,
    fisher: Tensor | None = None,
    polish: bool = False,
    first: tuple[Tensor, Tensor] | None = None,
) -> Decomposition:
    """In turn L1·L2 ← the best rank-r part of W − Q, from Q = 0 on, and Q ← the rounding of W − L1·L2.

    It ends when the error rises, and gives the best round. (The published code gives the one that rose.)

    Args:
        weight: W, (d_out, d_in) float32 and finite.
        iterations: rounds, at most.
        rtol: end also when a round gains less than this share of the error.
        fisher: F, (d_out, d_in); None counts all entries alike.
        polish: fit L1·L2 to the last Q once more, which by Eckart–Young can only gain; without `fisher` and with exact
            factors only.
        first: what `factors` gave for W, if that is known: it is the same for every format.
    """
    root = None if fisher is None else fisher.sqrt()
    residual = weight
    best: tuple[Tensor, Tensor, Tensor] | None = None
    last = math.inf
    trace: list[float] = []
    for _ in range(iterations):
        left, right = first if first is not None and not trace else factors(residual)
        rest = torch.addmm(weight, left, right, alpha=-1)
        quantised = rounded(rest, form)
        error = _norm(rest - quantised, root)
        trace.append(error)
        if not math.isfinite(error) or error > last:
            break
        best = (left, right, rest)
        residual = weight - quantised
        gained, last = last - error, error
        if gained <= rtol * error and rtol > 0:
            break
    if best is None:
        raise ValueError("the format can not hold the scales of this matrix")
    left, right, rest = best
    polished = False
    if polish and fisher is None:
        residual = weight - rounded(rest, form)
        again = factors(residual)
        error = _norm(residual - again[0] @ again[1], None)
        if error < last:  # not so where the subspace of a large matrix missed something
            (left, right), last, polished = again, error, True
    return Decomposition(left, right, rest, last, tuple(trace), polished)


def _norm(matrix: Tensor, root: Tensor | None) -> float:
    return float((matrix if root is None else root * matrix).double().norm())
