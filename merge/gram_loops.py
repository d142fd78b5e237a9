"""The compiled loops behind Gram matrices of float32 on a CPU.

Libraries multiply a matrix with its transpose as if all of the result were new, or by kernels that leave half of a
processor's width idle. Here only blocks on or above the diagonal are formed, each in registers (`merge.panel`).
"""

from __future__ import annotations

import numpy as np

from merge.panel import COLUMNS, LANES, ROWS, compiled, panel, transpose

PANEL_DIGEST = "9d703af77a899bd1"
"""As in `merge.entry_loops`."""

BLOCK = 1 << 16
"""Numbers of a packed block, which a core's cache holds beside the result."""
MOST_TERMS, LEAST_TERMS = 512, 64
"""Of a sum in float32; the sums of blocks are added in float64."""


@compiled
def _terms(width):
    return min(max(BLOCK // width, LEAST_TERMS), MOST_TERMS)


@compiled
def _add_block(block, start, width, terms, part, result):
    """result (width, width), on and above the diagonal, += XᵀX of X (terms, width), flat in `block` from a start on."""
    for r in range(0, width, ROWS):
        for c in range(r - r % COLUMNS, width, COLUMNS):
            panel(block, start + c, width, block, start + r, 1, width, terms, part, 0, COLUMNS)
            for i in range(ROWS):
                row = result[r + i]
                for j in range(COLUMNS):
                    row[c + j] += part[i * COLUMNS + j]


@compiled
def _mirror(result):
    for r in range(len(result)):
        for c in range(r):
            result[r, c] = result[c, r]


@compiled
def column_gram(X, result):
    """result (width, width) += the inner products of the columns of X: (d, n).

    The width is the multiple of COLUMNS from n on.
    """
    d, n = X.shape
    width = len(result)
    most, flat, part = _terms(width), X.ravel(), np.empty(ROWS * COLUMNS, X.dtype)
    packed = np.zeros((most if n < width else 1, width), X.dtype)
    for first in range(0, d, most):
        terms = min(most, d - first)
        if n == width:
            _add_block(flat, first * n, width, terms, part, result)
            continue
        for k in range(terms):
            for c in range(n):
                packed[k, c] = X[first + k, c]
        _add_block(packed.ravel(), 0, width, terms, part, result)
    _mirror(result)


@compiled
def row_gram(X, result):
    """As `column_gram` of the rows of X: (n, d)."""
    n, d = X.shape
    width = len(result)
    most, flat, part = _terms(width), X.ravel(), np.empty(ROWS * COLUMNS, X.dtype)
    packed = np.zeros((most, width), X.dtype)
    flat_packed = packed.ravel()
    whole_rows = n - n % LANES
    for first in range(0, d, most):
        terms = min(most, d - first)
        whole_terms = terms - terms % LANES
        for i in range(0, whole_rows, LANES):
            for k in range(0, whole_terms, LANES):
                transpose(flat, i * d + first + k, d, flat_packed, k * width + i, width)
        for i in range(n):
            for k in range(whole_terms if i < whole_rows else 0, terms):
                packed[k, i] = X[i, first + k]
        _add_block(flat_packed, 0, width, terms, part, result)
    _mirror(result)
