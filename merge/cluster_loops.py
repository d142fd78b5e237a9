"""The compiled loops that sum float32 components cluster by cluster on a CPU.

A product with the matrix of the means would multiply by zeros nearly everywhere: every component is in one cluster.
"""

from __future__ import annotations

import numpy as np

from merge.panel import LANES, compiled, fused, sum_lanes, transpose

PANEL_DIGEST = "9d703af77a899bd1"
"""As in `merge.entry_loops`."""


@compiled
def row_sums(A, members, starts, factors, result):
    """result (k, d): the sums of the rows of A: (n, d), each times its factor, over the members of each cluster.

    Args:
        members: (n,) the components, cluster by cluster; starts: (k + 1,) where each cluster begins, and n. int64.
        factors: (n,) of the members, in that order.
    """
    for c in range(len(result)):
        total = result[c]
        total[:] = 0
        for place in range(starts[c], starts[c + 1]):
            row, factor = A[members[place]], factors[place]
            for j in range(len(total)):
                total[j] = fused(factor, row[j], total[j])


@compiled
def column_sums(B, members, starts, factors, result):
    """result (d, k): as `row_sums` of the columns of B: (d, n)."""
    d, n = B.shape
    k = result.shape[1]
    wide, narrow, whole = n - n % LANES, k - k % LANES, d - d % LANES
    flat_B, flat = B.ravel(), result.ravel()
    turned, sums = np.empty(n * LANES, B.dtype), np.empty(k * LANES, B.dtype)
    for r in range(0, whole, LANES):
        # LANES rows side by side: what is added are vectors of numbers of one component
        for i in range(0, wide, LANES):
            transpose(flat_B, r * n + i, n, turned, i * LANES, LANES)
        for i in range(wide, n):
            for lane in range(LANES):
                turned[i * LANES + lane] = B[r + lane, i]
        for c in range(k):
            sum_lanes(turned, members, factors, starts[c], starts[c + 1], sums, c * LANES)
        for c in range(0, narrow, LANES):
            transpose(sums, c * LANES, LANES, flat, r * k + c, k)
        for c in range(narrow, k):
            for lane in range(LANES):
                result[r + lane, c] = sums[c * LANES + lane]
    for r in range(whole, d):
        for c in range(k):
            total = np.float32(0)
            for place in range(starts[c], starts[c + 1]):
                total = fused(factors[place], B[r, members[place]], total)
            result[r, c] = total
