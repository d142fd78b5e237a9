"""The compiled loops that sum float32 components cluster by cluster on a CPU.

A product with the matrix of the means would multiply by zeros nearly everywhere: every component is in one cluster.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from merge.panel import LANES, compiled, fused, transpose

PANEL_DIGEST = "458f96fb378de39f"
"""As in `merge.entry_loops`."""


@intrinsic
def _sum_lanes(_typing, X, members, factors, first, last, Y, y):
    """Y[y:] = Σ factors[p]·X[LANES·members[p]:] over first ≤ p < last, LANES numbers each, of flat float32 arrays.

    `members` are int64. Each term is rounded once.
    """
    signature = types.void(X, members, factors, first, last, Y, y)

    def generate(context, builder, signature, values):
        vector = ir.VectorType(ir.FloatType(), LANES)
        undefined, first_lane = vector(ir.Undefined), ir.IntType(32)(0)
        everywhere = ir.VectorType(ir.IntType(32), LANES)([0] * LANES)

        def data(place):
            return context.make_array(signature.args[place])(context, builder, values[place]).data

        X, members, factors, Y = (data(place) for place in (0, 1, 2, 5))
        total = cgutils.alloca_once_value(builder, vector(None))
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, (vector, vector, vector)), f"llvm.fma.v{LANES}f32"
        )
        with cgutils.for_range_slice(builder, values[3], values[4], values[3].type(1)) as (place, _):
            member = builder.load(builder.gep(members, [place]))
            there = builder.gep(X, [builder.mul(member, member.type(LANES))])
            numbers = builder.load(builder.bitcast(there, vector.as_pointer()), align=4)
            factor = builder.load(builder.gep(factors, [place]))
            lane = builder.insert_element(undefined, factor, first_lane)
            spread = builder.shuffle_vector(lane, undefined, everywhere)
            builder.store(builder.call(fma, [spread, numbers, builder.load(total)]), total)
        to = builder.bitcast(builder.gep(Y, [values[6]]), vector.as_pointer())
        builder.store(builder.load(total), to, align=4)
        return context.get_dummy_value()

    return signature, generate


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
            _sum_lanes(turned, members, factors, starts[c], starts[c + 1], sums, c * LANES)
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
