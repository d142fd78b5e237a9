"""A truncated SVD of a matrix that comes a few rows at a time, and is kept as a whole only where there is room."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge import entry_loops
from merge.memory import Room
from merge.panel import COLUMNS
from merge.rows import WHOLE, finite, overflow
from merge.rules import compiled

OVERSAMPLING = 8
"""Directions that the subspace iteration carries beyond the rank."""

ROOM = Room(1 << 29)
"""For the matrices that this process keeps between two passes over their rows; others come anew in every pass."""

MOST_COLUMNS = 2 * COLUMNS
"""Of the directions that the compiled products take."""

BLOCK_ROWS = 64
"""Of the matrix that come at a time."""

Fill = Callable[[int, Tensor], None]
"""Writes the matrix's rows from the given one on into a tensor (rows, d_in); the same every time it is called."""


class LowRank(NamedTuple):
    """A: (k, d_in) and B: (d_out, k) with √σ on either side, and ‖M − BA‖_F/‖M‖_F."""

    A: Tensor
    B: Tensor
    truncation_error: float


def row_svd(fill: Fill, shape: tuple[int, int], rank: int, start: Tensor, passes: int) -> LowRank:
    """A rank-`rank` approximation of the matrix M.

    Up to `WHOLE` entries, or when the rank leaves nothing out, it is the best one. Beyond, subspace iteration: `passes`
    passes over the rows, all but the last of which apply MᵀM to a block of directions, and the last of which projects
    M to them. It begins with directions that are known to matter.

    Args:
        fill: of M.
        shape: (d_out, d_in).
        start: (d_in, s) directions to begin with.
        passes: at least 1.

    Raises:
        MergeRefused: entries, or sums of their squares, overflow.
    """
    rank = min(rank, *shape)
    if shape[0] * shape[1] <= WHOLE:
        return _whole(torch.cat([block.clone() for block in _blocks(fill, shape, start)]), rank)
    Q = _orthonormal(_directions(start, shape[1], min(rank + OVERSAMPLING, *shape)))
    with _replayed(fill, shape, start, passes) as replayed:
        for _ in range(passes - 1):
            Z, project = Q.new_zeros(Q.shape[1], Q.shape[0]), _projection(Q)
            for block in replayed():
                _add_product(Z, project(block), block)
            Q = _orthonormal(finite(Z).T)
        projected, energy, project = [], 0.0, _projection(Q)
        for block in replayed():
            projected.append(project(block))
            flat = block.reshape(-1)
            energy += float(flat @ flat)
    if not math.isfinite(energy):
        raise overflow()
    return _split(finite(torch.cat(projected)), Q, rank, energy)


@contextmanager
def _replayed(
    fill: Fill, shape: tuple[int, int], like: Tensor, passes: int
) -> Iterator[Callable[[], Iterator[Tensor]]]:
    """The blocks of rows, kept from the first pass on where there is room for all and they are needed again."""
    size = shape[0] * shape[1] * like.element_size()
    if passes == 1:
        yield lambda: _blocks(fill, shape, like)
        return
    with ROOM.taken(size) as granted:
        yield _kept(fill, shape, like) if granted else lambda: _blocks(fill, shape, like)


def _blocks(fill: Fill, shape: tuple[int, int], like: Tensor) -> Iterator[Tensor]:
    """From top to bottom. The next block overwrites the one before."""
    buffer = like.new_empty(min(BLOCK_ROWS, shape[0]), shape[1])
    for row in range(0, shape[0], BLOCK_ROWS):
        block = buffer[: shape[0] - row]
        fill(row, block)
        yield block


def _kept(fill: Fill, shape: tuple[int, int], like: Tensor) -> Callable[[], Iterator[Tensor]]:
    """The same blocks again: whether there was room must not show in the order in which sums are rounded."""
    matrix = _empty(shape, like)
    filled = False

    def replayed() -> Iterator[Tensor]:
        nonlocal filled
        for row in range(0, shape[0], BLOCK_ROWS):
            block = matrix[row : row + BLOCK_ROWS]
            if not filled:
                fill(row, block)
            yield block
        filled = True

    return replayed


def _projection(Q: Tensor) -> Callable[[Tensor], Tensor]:
    """block ↦ block·Q."""
    if not _narrow(Q):
        return lambda block: block @ Q
    panels = -(-Q.shape[1] // COLUMNS)
    padded = Q.new_zeros(len(Q), panels * COLUMNS)
    padded[:, : Q.shape[1]] = Q

    def project(block: Tensor) -> Tensor:
        result = block.new_zeros(len(block), padded.shape[1])
        entry_loops.add_product(block.numpy(), padded.numpy(), result.numpy())
        return result[:, : Q.shape[1]].contiguous()

    return project


def _add_product(Z: Tensor, projected: Tensor, block: Tensor) -> None:
    """Z += projectedᵀ·block."""
    if _narrow(projected):
        entry_loops.add_transposed_product(projected.numpy(), block.numpy(), Z.numpy())
    else:
        Z.addmm_(projected.T, block)


def _narrow(X: Tensor) -> bool:
    """Whether the compiled products are the faster ones."""
    return compiled(X) and X.shape[1] <= MOST_COLUMNS


def _empty(shape: tuple[int, int], like: Tensor) -> Tensor:
    # numpy asks for pages of megabytes, torch does not: touching them first would be a fifth of the time
    return torch.from_numpy(np.empty(shape, like.numpy().dtype)) if like.device.type == "cpu" else like.new_empty(shape)


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
    return Q.contiguous()


def _whole(M: Tensor, rank: int) -> LowRank:
    tall = M.shape[0] > M.shape[1]
    N = (M.T if tall else M).double()
    vectors = torch.linalg.eigh(finite(N @ N.T)).eigenvectors.flip(1)[:, :rank]
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
