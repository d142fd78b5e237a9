"""The compiled loops that multiply wide float32 factors by small matrices on a CPU.

Every entry is the sum of its terms in the order of the components, each rounded once (`merge.panel`): so a product with
the first rows, or columns, of a small matrix is, bit for bit, the first rows or columns of the whole product.
"""

from __future__ import annotations

import numpy as np

from merge.panel import COLUMNS, ROWS, compiled, fused, panel

PANEL_DIGEST = "458f96fb378de39f"
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
def column_product(B, C, result):
    """result (d, k) = B·C of B: (d, n) and C: (n, width); the width is the multiple of COLUMNS from k on."""
    d, n = B.shape
    width, k = C.shape[1], result.shape[1]
    flat_B, flat_C, part = B.ravel(), C.ravel(), np.empty(ROWS * COLUMNS, B.dtype)
    whole = d - d % ROWS
    for r in range(0, whole, ROWS):
        for c in range(0, width, COLUMNS):
            panel(flat_C, c, width, flat_B, r * n, n, 1, n, part, 0, COLUMNS)
            count = min(COLUMNS, k - c)
            for i in range(ROWS):
                result[r + i, c : c + count] = part[i * COLUMNS : i * COLUMNS + count]
    for r in range(whole, d):
        for c in range(k):
            total = np.float32(0)
            for i in range(n):
                total = fused(B[r, i], C[i, c], total)
            result[r, c] = total
