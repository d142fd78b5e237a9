"""A truncated SVD of a matrix that comes a few rows at a time and is never there as a whole, unless it is small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from merge.rows import WHOLE

OVERSAMPLING = 8
"""Directions that the subspace iteration carries beyond the rank."""

Blocks = Callable[[], Iterable[Tensor]]
"""Yields the matrix from top to bottom, (rows, d_in) at a time; the same every time it is called."""


class LowRank(NamedTuple):
    """A: (k, d_in) and B: (d_out, k) with √σ on either side, and ‖M − BA‖_F/‖M‖_F."""

    A: Tensor
    B: Tensor
    truncation_error: float


def row_svd(blocks: Blocks, shape: tuple[int, int], rank: int, start: Tensor, passes: int) -> LowRank:
    """A rank-`rank` approximation of the matrix M.

    Up to `WHOLE` entries, or when the rank leaves nothing out, it is the best one. Beyond, subspace iteration: `passes`
    passes over the rows, all but the last of which apply MᵀM to a block of directions, and the last of which projects
    M to them. It begins with directions that are known to matter.

    Args:
        shape: (d_out, d_in).
        start: (d_in, s) directions to begin with.
        passes: at least 1.
    """
    rank = min(rank, *shape)
    if shape[0] * shape[1] <= WHOLE:
        return _whole(torch.cat([block.clone() for block in blocks()]), rank)
    Q = _orthonormal(_directions(start, shape[1], min(rank + OVERSAMPLING, *shape)))
    for _ in range(passes - 1):
        Z = torch.zeros_like(Q)
        for block in blocks():
            Z.addmm_(block.T, block @ Q)
        Q = _orthonormal(Z)
    projected, energy = [], 0.0
    for block in blocks():
        projected.append(block @ Q)
        flat = block.reshape(-1)
        energy += float(flat @ flat)
    return _split(torch.cat(projected), Q, rank, energy)


def _directions(start: Tensor, d_in: int, count: int) -> Tensor:
    """(d_in, count): those to begin with, and random ones beside them."""
    generator = torch.Generator().manual_seed(d_in)
    known = start[:, : max(count - OVERSAMPLING // 2, 1)]
    drawn = torch.randn(d_in, count - known.shape[1], generator=generator).to(start)
    return torch.cat([known, drawn], 1)


def _orthonormal(X: Tensor) -> Tensor:
    # Columns of very different length would drown in rounding.
    norms = X.norm(dim=0)
    Q: Tensor = torch.linalg.qr(X / torch.where(norms > 0, norms, 1.0)).Q
    return Q


def _whole(M: Tensor, rank: int) -> LowRank:
    tall = M.shape[0] > M.shape[1]
    N = (M.T if tall else M).double()
    vectors = torch.linalg.eigh(N @ N.T).eigenvectors.flip(1)[:, :rank]
    rows = vectors.T @ N
    root = rows.norm(dim=1).sqrt()
    left, right = vectors * root, torch.where(root[:, None] > 0, rows / root[:, None], 0.0)
    A, B = (left.T, right.T) if tall else (right, left)
    error = _relative(float(N.square().sum()), float(rows.square().sum()))
    return LowRank(A.to(M.dtype).contiguous(), B.to(M.dtype).contiguous(), error)


def _split(Y: Tensor, Q: Tensor, rank: int, energy: float) -> LowRank:
    """The leading part of Y·Qᵀ with Y: (d_out, l) and Q: (d_in, l) orthonormal."""
    exact = Y.double()
    squared, W = torch.linalg.eigh(exact.T @ exact)
    squared, W = squared.flip(0)[:rank].clamp_min(0), W.flip(1)[:, :rank]
    root = squared.sqrt().sqrt()
    B = Y @ torch.where(root > 0, W / root, 0.0).to(Y.dtype)
    A = (Q @ (W * root).to(Q.dtype)).T
    return LowRank(A.contiguous(), B, _relative(energy, float(squared.sum())))


def _relative(energy: float, held: float) -> float:
    return math.sqrt(max(energy - held, 0.0) / energy) if energy > 0 else 0.0
