"""A truncated SVD of a matrix that comes a few rows at a time, and is kept as a whole only where there is room."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from merge import strip_loops, strips
from merge.brackets import overflow
from merge.memory import Room
from merge.panel import COLUMNS, LANES
from merge.rows import finite
from merge.rules import compiled
from merge.strips import BLOCK_ROWS

WHOLE = 1 << 20
"""Entries up to which a matrix is taken as a whole."""

OVERSAMPLING = 16
"""Directions that a pass carries beyond the rank, at least."""

KNOWN = 4
"""Directions beyond the rank that are taken from those to begin with; the others come from a look at some rows."""

LOOK = 16
"""Blocks of rows of which one is looked at."""

TOLERANCE = 1e-6
"""Of the squared singular values of what M makes of the directions, each scaled to length 1: below lies rounding."""

SMALL = 1e-24
"""A ‖M‖² below which products with M and with Mᵀ may vanish in float32: such a matrix is truncated in other units."""

ROOM = Room(1 << 29)
"""For the matrices that this process keeps between two passes over their rows; others come anew in every pass."""

Fill = Callable[[int, Tensor], None]
"""Writes the matrix's rows from the given one on into a block; the same every time it is called.

The block is (strips, BLOCK_ROWS, COLUMNS) of `merge.strips` where the compiled loops take it, else (rows, d_in).
"""


class LowRank(NamedTuple):
    """A: (k, d_in) and B: (d_out, k) with √σ on either side, and ‖M − BA‖_F/‖M‖_F."""

    A: Tensor
    B: Tensor
    truncation_error: float


def directions(rank: int) -> int:
    """How many a pass carries."""
    return -(-(rank + OVERSAMPLING) // LANES) * LANES


def row_svd(fill: Fill, shape: tuple[int, int], rank: int, start: Tensor, passes: int) -> LowRank:
    """A rank-`rank` approximation of the matrix M.

    Up to `WHOLE` entries, or when the rank leaves next to nothing out, it is the best one. Beyond, subspace iteration:
    each of the `passes` over the rows applies M to a block of directions Q, and Mᵀ to that, which gives the next Q. The
    last one needs no more than these two products: with Y = MQ = UR it holds UᵀM = R⁻ᵀ(MᵀY)ᵀ, and the leading part of
    U·UᵀM is the result. It begins with directions that are known to matter, and with those that the same finds
    in one of `LOOK` blocks of rows.

    Args:
        fill: of M.
        shape: (d_out, d_in).
        start: (d_in, s) directions to begin with, the most important first.
        passes: at least 1.

    Raises:
        MergeRefused: entries, or sums of their squares, overflow.
    """
    rank, start, count = min(rank, *shape), start.contiguous(), directions(min(rank, *shape))
    if shape[0] * shape[1] <= WHOLE or min(shape) <= count:
        return _whole(torch.cat([_plain(block, shape, row) for row, block in _blocks(fill, shape, start)]), rank)
    Q = _orthonormal(_with_random(start[:, :count], count))
    if shape[0] >= LOOK * BLOCK_ROWS:
        known = start[:, : rank + KNOWN]
        Q = _orthonormal(torch.cat([known, _seen(fill, shape, Q, count - known.shape[1])], 1))
    with _replayed(fill, shape, start, passes) as replayed:
        for number in range(passes):
            Y, Z, energy = _products(replayed(), shape, Q)
            if number < passes - 1:
                Q = _orthonormal(Z)
    if energy < SMALL and (root := _root(fill, shape, start)) > 1:
        low = row_svd(_times(fill, root * root), shape, rank, start, passes)
        return LowRank(low.A / root, low.B / root, low.truncation_error)
    return _split(Y, Z, rank, energy)


def _root(fill: Fill, shape: tuple[int, int], like: Tensor) -> float:
    """A power of two whose square, times M, has a largest |entry| near 1; 1 for zeros."""
    largest = max(float(block.abs().max()) for _, block in _blocks(fill, shape, like))
    # of the smallest float32 no larger power brings more, and none overflows
    return 2.0 ** min(-math.frexp(largest)[1] // 2, 63) if largest > 0 else 1.0


def _times(fill: Fill, size: float) -> Fill:
    def filled(row: int, block: Tensor) -> None:
        fill(row, block)
        block.mul_(size)

    return filled


def _products(blocks: Iterator[tuple[int, Tensor]], shape: tuple[int, int], Q: Tensor) -> tuple[Tensor, Tensor, float]:
    """Y = M·Q: (d_out, l), MᵀY: (d_in, l) and ‖M‖².

    Raises:
        MergeRefused: one of them overflows.
    """
    d_out, d_in = shape
    energy, count = 0.0, Q.shape[1]
    Y = Q.new_empty(-(-d_out // BLOCK_ROWS) * BLOCK_ROWS, count)
    if compiled(Q):
        across = Q.new_zeros(-(-d_in // COLUMNS), count, COLUMNS)
        padded = torch.cat([Q, Q.new_zeros(len(across) * COLUMNS - d_in, count)])
        for row, block in blocks:
            here = Y[row : row + BLOCK_ROWS]
            energy += strip_loops.project(block.numpy(), padded.numpy(), here.numpy(), across.numpy())
        Z = across.transpose(1, 2).flatten(0, 1)[:d_in]
    else:
        Z = Q.new_zeros(d_in, count)
        for row, block in blocks:
            here = Y[row : row + len(block)]
            torch.mm(block, Q, out=here)
            Z.addmm_(block.T, here)
            energy += float(block.reshape(-1) @ block.reshape(-1))
    if not math.isfinite(energy):
        raise overflow()
    return finite(Y[:d_out]), finite(Z), energy


@contextmanager
def _replayed(
    fill: Fill, shape: tuple[int, int], like: Tensor, passes: int
) -> Iterator[Callable[[], Iterator[tuple[int, Tensor]]]]:
    """The blocks of rows, kept from the first pass on where there is room for all and they are needed again."""
    size = shape[0] * shape[1] * like.element_size()
    if passes == 1:
        yield lambda: _blocks(fill, shape, like)
        return
    with ROOM.taken(size) as granted:
        yield _kept(fill, shape, like) if granted else lambda: _blocks(fill, shape, like)


def _blocks(
    fill: Fill, shape: tuple[int, int], like: Tensor, rows: range | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, block), from top to bottom, or from some rows on. The next block overwrites the one before."""
    buffer = strips.new_block(shape[1], like) if compiled(like) else like.new_empty(BLOCK_ROWS, shape[1])
    for row in rows or range(0, shape[0], BLOCK_ROWS):
        block = buffer if compiled(like) else buffer[: shape[0] - row]
        fill(row, block)
        yield row, block


def _plain(block: Tensor, shape: tuple[int, int], row: int) -> Tensor:
    """A copy of a block's rows (…, d_in)."""
    if block.dim() == 2:
        return block.clone()
    return strips.read(block, min(BLOCK_ROWS, shape[0] - row), shape[1])


def _kept(fill: Fill, shape: tuple[int, int], like: Tensor) -> Callable[[], Iterator[tuple[int, Tensor]]]:
    """The same blocks again: whether there was room must not show in the order in which sums are rounded."""
    kept: list[Tensor] = []

    def replayed() -> Iterator[tuple[int, Tensor]]:
        if kept:
            yield from zip(range(0, shape[0], BLOCK_ROWS), kept, strict=True)
            return
        for row, block in _blocks(fill, shape, like):
            kept.append(block.clone())
            yield row, block

    return replayed


def _seen(fill: Fill, shape: tuple[int, int], Q: Tensor, count: int) -> Tensor:
    """(d_in, count): the leading directions of some blocks of rows, by a pass over them that begins with Q."""
    rows = range(0, shape[0] - BLOCK_ROWS + 1, LOOK * BLOCK_ROWS)
    looked_at = ((place * BLOCK_ROWS, block) for place, (_, block) in enumerate(_blocks(fill, shape, Q, rows)))
    Y, Z, energy = _products(looked_at, (len(rows) * BLOCK_ROWS, shape[1]), Q)
    return _split(Y, Z, count, energy).A.T


def _with_random(start: Tensor, count: int) -> Tensor:
    """(d_in, count): those to begin with, and random ones beside them."""
    d_in, known = start.shape
    generator = torch.Generator().manual_seed(d_in)
    return torch.cat([start, torch.randn(d_in, count - known, generator=generator).to(start)], 1)


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


def _split(Y: Tensor, Z: Tensor, rank: int, energy: float) -> LowRank:
    """The leading part of U·UᵀM from Y = MQ: (d_out, l), whose columns U spans, and Z = MᵀY: (d_in, l)."""
    exact = Y.double()
    norms = exact.norm(dim=0)
    # what M is not applied to at all says nothing; the others count alike, whatever their length
    used = norms > 0
    unit, across = exact[:, used] / norms[used], Z.double()[:, used] / norms[used]
    squared, V = torch.linalg.eigh(unit.T @ unit)
    kept = squared > TOLERANCE
    basis = V[:, kept] / squared[kept].sqrt()
    rows = basis.T @ across.T  # UᵀM with U = unit·basis
    energies, W = torch.linalg.eigh(rows @ rows.T)
    energies, W = energies.flip(0)[:rank].clamp_min(0), W.flip(1)[:, :rank]
    root = energies.sqrt().sqrt()
    B = exact.new_zeros(len(Y), rank)
    A = exact.new_zeros(rank, len(Z))
    B[:, : len(root)] = unit @ (basis @ (W * root))
    A[: len(root)] = (torch.where(root > 0, W / root, 0.0)).T @ rows
    return LowRank(A.to(Z.dtype), B.to(Y.dtype), _relative(energy, float(energies.sum())))


def _relative(energy: float, held: float) -> float:
    return math.sqrt(max(energy - held, 0.0) / energy) if energy > 0 else 0.0
