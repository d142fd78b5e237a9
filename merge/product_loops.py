"""The compiled loops that multiply wide float32 factors by small matrices on a CPU.

Every entry is the sum of its terms in the order of the components, each rounded once (`merge.panel`): so a product with
the first rows, or columns, of a small matrix is, bit for bit, the first rows or columns of the whole product.
"""

from __future__ import annotations

import numpy as np

from merge.panel import COLUMNS, LANES, ROWS, compiled, fused, panel, transpose

PANEL_DIGEST = "9d703af77a899bd1"
"""As in `merge.entry_loops`."""


@compiled
def row_product(C, A, result):
    """result (k, d) = C·A of C: (k, n) and A: (n, d); k is a multiple of ROWS."""
    k, n = C.shape
    d = A.shape[1]
    flat_A, flat_C, flat = A.ravel(), C.ravel(), result.ravel()
    whole = d - d % COLUMNS
    for c in range(0, whole, COLUMNS):
        for r in range(0, k, ROWS):
            panel(flat_A, c, d, flat_C, r * n, n, 1, n, flat, r * d + c, d)
    for r in range(k):
        for c in range(whole, d):
            total = np.float32(0)
            for i in range(n):
                total = fused(C[r, i], A[i, c], total)
            result[r, c] = total


@compiled
def _turn(flat, start, step, rows, columns, result, result_step):
    """result[i·result_step + j] = flat[start + j·step + i] for i < columns and j < rows, a multiple of LANES."""
    whole = columns - columns % LANES
    for j in range(0, rows, LANES):
        for i in range(0, whole, LANES):
            transpose(flat, start + j * step + i, step, result, i * result_step + j, result_step)
    for j in range(rows):
        for i in range(whole, columns):
            result[i * result_step + j] = flat[start + j * step + i]


@compiled
def column_product(B, C, result):
    """result (d, k) = B·Cᵀ of B: (d, n) and C: (width, n); the width is the multiple of ROWS from k on."""
    d, n = B.shape
    width, k = len(C), result.shape[1]
    flat_B, flat_C, flat = B.ravel(), C.ravel(), result.ravel()
    narrow, whole = k - k % LANES, d - d % COLUMNS
    turned, part = np.empty(n * COLUMNS, B.dtype), np.empty(width * COLUMNS, B.dtype)
    for first in range(0, whole, COLUMNS):
        # rows side by side, as those of the other factor are in `row_product`
        _turn(flat_B, first * n, n, COLUMNS, n, turned, COLUMNS)
        for c in range(0, width, ROWS):
            panel(turned, 0, COLUMNS, flat_C, c * n, n, 1, n, part, c * COLUMNS, COLUMNS)
        _turn(part, 0, COLUMNS, narrow, COLUMNS, flat[first * k :], k)
        for r in range(COLUMNS):
            for c in range(narrow, k):
                result[first + r, c] = part[c * COLUMNS + r]
    for r in range(whole, d):
        for c in range(k):
            total = np.float32(0)
            for i in range(n):
                total = fused(B[r, i], C[c, i], total)
            result[r, c] = total
