"""One step of a matrix product in the registers of the processor: what the compiled loops form deltas with.

Libraries for matrix products are made for long sums; those of a delta are as short as a rank, and half of the time
goes into copies. Here a panel of the result stays in registers from its first term to its last. Every entry is the sum
of its terms in the order of the components, each rounded once (fused multiply-add), whatever the place of the panel:
so entries do not depend on how a matrix is cut, nor on what reads them.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Of a vector of float32; processors with shorter ones take several."""
VECTORS = 4
ROWS = 4
COLUMNS = LANES * VECTORS
"""A panel is (ROWS, COLUMNS)."""


@intrinsic
def fused(_typing, a, b, c):
    """a·b + c of float32, rounded once."""
    return a(a, b, c), lambda _context, builder, _signature, values: builder.fma(*values)


@intrinsic
def panel(_typing, A, a, a_step, B, b, b_step, terms, X, x, x_step):
    """X[x + i·x_step + j] = Σₖ B[b + i·b_step + k]·A[a + k·a_step + j] of the flat float32 arrays A, B and X.

    For i < ROWS, j < COLUMNS and k < terms.
    """
    signature = types.void(A, a, a_step, B, b, b_step, terms, X, x, x_step)

    def generate(context, builder, signature, values):
        vector = ir.VectorType(ir.FloatType(), LANES)
        arrays = {
            place: context.make_array(signature.args[place])(context, builder, values[place]).data
            for place in (0, 3, 7)
        }
        a, a_step, b, b_step, terms, x, x_step = (values[place] for place in (1, 2, 4, 5, 6, 8, 9))
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, (vector, vector, vector)), f"llvm.fma.v{LANES}f32"
        )

        def address(array, place, number):
            there = builder.gep(arrays[array], [builder.add(place, place.type(number))])
            return builder.bitcast(there, vector.as_pointer())

        sums = [[cgutils.alloca_once_value(builder, vector(None)) for _ in range(VECTORS)] for _ in range(ROWS)]
        with cgutils.for_range(builder, terms) as loop:
            start = builder.add(a, builder.mul(loop.index, a_step))
            parts = [builder.load(address(0, start, LANES * v), align=4) for v in range(VECTORS)]
            for i in range(ROWS):
                place = builder.add(builder.add(b, builder.mul(b_step, b_step.type(i))), loop.index)
                factor = builder.load(builder.gep(arrays[3], [place]))
                lane = builder.insert_element(vector(ir.Undefined), factor, ir.IntType(32)(0))
                spread = builder.shuffle_vector(
                    lane, vector(ir.Undefined), ir.VectorType(ir.IntType(32), LANES)([0] * LANES)
                )
                for v in range(VECTORS):
                    builder.store(builder.call(fma, [spread, parts[v], builder.load(sums[i][v])]), sums[i][v])
        for i in range(ROWS):
            row = builder.add(x, builder.mul(x_step, x_step.type(i)))
            for v in range(VECTORS):
                builder.store(builder.load(sums[i][v]), address(7, row, LANES * v), align=4)
        return context.get_dummy_value()

    return signature, generate
