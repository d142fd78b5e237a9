"""The compiled loops of the methods on single entries: blocks of float32 rows on a CPU, every entry touched once.

They do what `merge.rules` and `merge.rows` define; see there. Blocks X are (N, rows, columns), contiguous, of a size
that the cores' own caches hold: then what bounds a merge is the product BᵢAᵢ, and not what is done to its entries.
"""

from __future__ import annotations

import numpy as np

from merge.panel import (
    COLUMNS,
    LANES,
    ROWS,
    compiled,
    elected_by_count,
    elected_by_sum,
    fused,
    panel,
    sum_panel,
    variance_panel,
)

PANEL_DIGEST = "9d703af77a899bd1"
"""Of panel.py: numba's cache keeps what it compiled from that file until this one changes."""


@compiled
def form(A, B, starts, row, column, X):
    """X (N, rows, columns) = the entries of BᵢAᵢ from a row and a column on.

    Every entry is rounded the same, whatever tile it lies in (`merge.panel`).

    Args:
        A: (n, d_in or more); B: (d_out, n); starts: (N + 1,) where the components of each block begin, and n.
    """
    flat_A, flat_B, flat_X = A.ravel(), B.ravel(), X.ravel()
    rows, columns = X.shape[1:]
    whole_rows, whole_columns = rows - rows % ROWS, columns - columns % COLUMNS
    for i in range(len(X)):
        first, terms = starts[i], starts[i + 1] - starts[i]
        for c in range(0, whole_columns, COLUMNS):
            a = first * A.shape[1] + column + c
            for r in range(0, whole_rows, ROWS):
                b, x = (row + r) * B.shape[1] + first, (i * rows + r) * columns + c
                panel(flat_A, a, A.shape[1], flat_B, b, B.shape[1], 1, terms, flat_X, x, columns)
        for r in range(rows):
            for c in range(whole_columns if r < whole_rows else 0, columns):
                total = np.float32(0)
                for k in range(first, first + terms):
                    total = fused(B[row + r, k], A[k, column + c], total)
                X[i, r, c] = total


@compiled
def weighted_sum(X, lower, upper, weights, result):
    """result (m,) = Σ wᵢxᵢ over lowerᵢ ≤ |xᵢ| < upperᵢ, all (N,), of flattened blocks X: (N, m)."""
    count, size = X.shape
    whole, flat_X = size - size % LANES, X.ravel()
    for c in range(0, whole, LANES):
        sum_panel(flat_X, c, size, count, lower, upper, weights, result, c)
    for c in range(whole, size):
        total = np.float32(0)
        for i in range(count):
            if (abs(X[i, c]) >= lower[i]) & (abs(X[i, c]) < upper[i]):
                total += weights[i] * X[i, c]
        result[c] = total


@compiled
def elected(X, lower, upper, votes, weights, shares, by_count, result):
    """As `weighted_sum` over the entries of the elected sign, divided by the sum of their shares (1 where that is 0).

    The sign is that of Σ votesᵢ·xᵢ, or of the count of their signs; 0 elects plus.
    """
    count, size = X.shape
    whole, flat_X = size - size % LANES, X.ravel()
    if by_count:
        for c in range(0, whole, LANES):
            elected_by_count(flat_X, c, size, count, lower, upper, votes, weights, shares, result, c)
    else:
        for c in range(0, whole, LANES):
            elected_by_sum(flat_X, c, size, count, lower, upper, votes, weights, shares, result, c)
    nothing = np.float32(0)
    for c in range(whole, size):
        ballot, total, divisor = nothing, nothing, nothing
        for i in range(count):
            if (abs(X[i, c]) >= lower[i]) & (abs(X[i, c]) < upper[i]):
                voted = votes[i] * X[i, c]
                ballot += np.float32(int(voted > 0) - int(voted < 0)) if by_count else voted
        majority = np.float32(1 if ballot >= 0 else -1)
        for i in range(count):
            inside = (abs(X[i, c]) >= lower[i]) & (abs(X[i, c]) < upper[i])
            if inside & (votes[i] * X[i, c] * majority > 0):
                total += weights[i] * X[i, c]
                divisor += shares[i]
        result[c] = total / (divisor if divisor != 0 else np.float32(1))


@compiled
def variance(X, sizes, result):
    """result (m,) = the variance of sizesᵢ·xᵢ over the blocks, of flattened X: (N, m); 0 where it is rounding."""
    count, size = X.shape
    # the rounding of a mean, in parts of the largest of its terms
    share, rounding = np.float32(1 / count), np.float32(count * 2.0**-23)
    whole, flat_X = size - size % LANES, X.ravel()
    for c in range(0, whole, LANES):
        variance_panel(flat_X, c, size, count, sizes, share, rounding, np.float32(0), result, c)
    for c in range(whole, size):
        mean, squares, largest = np.float32(0), np.float32(0), np.float32(0)
        for i in range(count):
            mean += sizes[i] * X[i, c]
            largest = max(largest, abs(sizes[i] * X[i, c]))
        mean *= share
        for i in range(count):
            squares += (sizes[i] * X[i, c] - mean) ** 2
        found, border = squares * share, (rounding * largest) ** 2
        result[c] = np.float32(0) if found < border else found
