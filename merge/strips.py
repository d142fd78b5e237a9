"""Matrices in strips: as many columns as a panel has, of some rows, in one piece of memory.

The rows of a broad matrix lie a power of two apart, as a rule, so that what a panel reads of them competes for a few
places of a core's cache. In strips it fits: a product of eight adapters then runs at twice the speed.

A block of a matrix that the compiled loops take is (strips, BLOCK_ROWS, COLUMNS), with zeros beyond the last row and
column; any other is the plain (rows, d_in).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from merge.panel import COLUMNS

BLOCK_ROWS = 64
"""Of a matrix that come at a time."""


class Strips(NamedTuple):
    """The factors of deltas BᵢAᵢ, all components n side by side, as the loops on strips take them.

    Attributes:
        A: (strips, n, COLUMNS); B: (d_out up to a multiple of BLOCK_ROWS, n), zero beyond d_out.
        starts: (N + 1,) where the components of each delta begin, and n.
    """

    A: NDArray[np.float32]
    B: NDArray[np.float32]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, A: Sequence[Tensor], B: Sequence[Tensor]) -> Self:
        starts, d_out = np.cumsum([0, *(len(part) for part in A)]), len(B[0])
        strips = A[0].new_empty(-(-A[0].shape[1] // COLUMNS), int(starts[-1]), COLUMNS)
        padded = A[0].new_empty(-(-d_out // BLOCK_ROWS) * BLOCK_ROWS, int(starts[-1]))
        for first, part, column in zip(starts.tolist(), A, B, strict=False):
            write(strips[:, first : first + len(part)], part)
            padded[:d_out, first : first + len(part)] = column
        padded[d_out:] = 0
        return cls(strips.numpy(), padded.numpy(), starts)


def new_block(d_in: int, like: Tensor) -> Tensor:
    """(strips, BLOCK_ROWS, COLUMNS), not filled."""
    return like.new_empty(-(-d_in // COLUMNS), BLOCK_ROWS, COLUMNS)


def write(strips: Tensor, X: Tensor) -> None:
    """Put X (rows, d_in) in strips (strips, at least as many rows, COLUMNS), with zeros beyond."""
    rows, d_in = X.shape
    whole, rest = divmod(d_in, COLUMNS)
    strips[:whole, :rows] = X[:, : whole * COLUMNS].view(rows, whole, COLUMNS).transpose(0, 1)
    if rest:
        strips[whole, :rows, :rest] = X[:, whole * COLUMNS :]
        strips[whole, :rows, rest:] = 0
    strips[:, rows:] = 0


def read(strips: Tensor, rows: int, d_in: int) -> Tensor:
    """(rows, d_in), a copy."""
    copied = strips.new_empty(rows, *strips[:, 0].shape)
    copied.copy_(strips[:, :rows].transpose(0, 1))
    return copied.flatten(1)[:, :d_in]
