"""Single steps of the compiled loops on single entries, on as many of them as the registers of the processor hold.

`panel` is what deltas are formed with, and what is multiplied with the rows that are formed. Libraries for matrix
products are made for long sums and broad matrices; here the sums are as short as a rank, or the matrices as narrow, and
half of the time goes into copies. A panel of the result stays in registers from its first term to its last. Every
entry is the sum of its terms in the order of the components, each rounded once (fused multiply-add), whatever the place
of the panel: so entries do not depend on how a matrix is cut, nor on what reads them.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# numpy's division: a check for zero in every step would keep the loops from being vectors
compiled = njit(cache=True, nogil=True, error_model="numpy")

LANES = 16
"""Of a vector of float32; processors with shorter ones take several."""
ROWS, COLUMNS = 8, 2 * LANES
"""Of a panel."""


@intrinsic
def fused(_typing, a, b, c):
    """a·b + c of float32, rounded once."""
    return a(a, b, c), lambda _context, builder, _signature, values: builder.fma(*values)


def _panel(adds, columns):
    """X[x + i·x_step + j] = Σₖ B[b + i·b_step + k·b_next]·A[a + k·a_step + j] of the flat float32 arrays A, B and X.

    For i < ROWS, j < columns and k < terms; `adds`: what was in X is the first term.
    """
    vectors = columns // LANES

    @intrinsic
    def panel(_typing, A, a, a_step, B, b, b_step, b_next, terms, X, x, x_step):
        signature = types.void(A, a, a_step, B, b, b_step, b_next, terms, X, x, x_step)

        def generate(context, builder, signature, values):
            vector = ir.VectorType(ir.FloatType(), LANES)
            A, B, X = (_data(context, builder, signature, values, place) for place in (0, 3, 8))
            a, a_step, b, b_step, b_next, terms, x, x_step = (values[place] for place in (1, 2, 4, 5, 6, 7, 9, 10))
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, (vector, vector, vector)), f"llvm.fma.v{LANES}f32"
            )

            def address(array, place, number):
                there = builder.gep(array, [builder.add(place, place.type(number))])
                return builder.bitcast(there, vector.as_pointer())

            places = [builder.add(x, builder.mul(x_step, x_step.type(i))) for i in range(ROWS)]
            sums = [
                [
                    cgutils.alloca_once_value(
                        builder, builder.load(address(X, place, LANES * v), align=4) if adds else vector(None)
                    )
                    for v in range(vectors)
                ]
                for place in places
            ]
            with cgutils.for_range(builder, terms) as loop:
                start = builder.add(a, builder.mul(loop.index, a_step))
                parts = [builder.load(address(A, start, LANES * v), align=4) for v in range(vectors)]
                term = builder.add(b, builder.mul(loop.index, b_next))
                for i in range(ROWS):
                    place = builder.add(term, builder.mul(b_step, b_step.type(i)))
                    factor = _spread(builder, builder.load(builder.gep(B, [place])))
                    for v in range(vectors):
                        builder.store(builder.call(fma, [factor, parts[v], builder.load(sums[i][v])]), sums[i][v])
            for place, row in zip(places, sums, strict=True):
                for v in range(vectors):
                    builder.store(builder.load(row[v]), address(X, place, LANES * v), align=4)
            return context.get_dummy_value()

        return signature, generate

    return panel


panel = _panel(adds=False, columns=COLUMNS)
adding_panel = _panel(adds=True, columns=COLUMNS)
adding_half = _panel(adds=True, columns=LANES)


@intrinsic
def transpose(_typing, X, x, x_step, Y, y, y_step):
    """Y[y + j·y_step + i] = X[x + i·x_step + j] for i, j < LANES, of flat float32 arrays."""
    signature = types.void(X, x, x_step, Y, y, y_step)

    def generate(context, builder, signature, values):
        vector, index = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
        X, Y = (_data(context, builder, signature, values, place) for place in (0, 3))

        def address(array, start, step, number):
            there = builder.gep(array, [builder.add(start, builder.mul(step, step.type(number)))])
            return builder.bitcast(there, vector.as_pointer())

        rows = [builder.load(address(X, values[1], values[2], i), align=4) for i in range(LANES)]
        # quarters of ever smaller squares change places
        side = LANES // 2
        while side:
            first = index([lane if not lane & side else LANES + lane - side for lane in range(LANES)])
            second = index([lane + side if not lane & side else LANES + lane for lane in range(LANES)])
            for i in range(LANES):
                if not i & side:
                    pair = rows[i], rows[i + side]
                    rows[i], rows[i + side] = (builder.shuffle_vector(*pair, places) for places in (first, second))
            side //= 2
        for i in range(LANES):
            builder.store(rows[i], address(Y, values[4], values[5], i), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def glance(_typing, x, place, low, high):
    """What the LANES numbers of the float32 array x from a place on are: int64 of

    bits 0 to 15: those with low ≤ |x| ≤ high; from 16: how many are above high; from 32: those that are NaN.
    """
    signature = types.int64(x, place, low, high)

    def generate(context, builder, signature, values):
        vector, wide = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        there = builder.gep(_data(context, builder, signature, values, 0), [values[1]])
        numbers = builder.load(builder.bitcast(there, vector.as_pointer()), align=4)
        fabs = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, (vector,)), f"llvm.fabs.v{LANES}f32"
        )
        sizes = builder.call(fabs, [numbers])
        low, high = _spread(builder, values[2]), _spread(builder, values[3])

        def bits(flags):
            return builder.bitcast(flags, ir.IntType(LANES))

        inside = builder.and_(builder.fcmp_ordered(">=", sizes, low), builder.fcmp_ordered("<=", sizes, high))
        above = builder.ctpop(bits(builder.fcmp_ordered(">", sizes, high)))
        result = builder.zext(bits(inside), wide)
        for number, shift in ((above, 16), (bits(builder.fcmp_unordered("uno", sizes, sizes)), 32)):
            result = builder.or_(result, builder.shl(builder.zext(number, wide), wide(shift)))
        return result

    return signature, generate


def _windowed(builder, vector, number, lower, upper):
    """The LANES numbers at a pointer, and which have lower ≤ |x| < upper, for the i-th of these borders."""
    x = builder.load(builder.bitcast(number, vector.as_pointer()), align=4)
    fabs = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, (vector,)), f"llvm.fabs.v{LANES}f32")
    size = builder.call(fabs, [x])
    not_below = builder.fcmp_ordered(">=", size, _spread(builder, builder.load(lower)))
    return x, builder.and_(not_below, builder.fcmp_ordered("<", size, _spread(builder, builder.load(upper))))


@intrinsic
def sum_panel(_typing, X, x, x_step, count, lower, upper, weights, result, place):
    """`entry_loops.weighted_sum` of LANES entries: the i-th block's are X[x + i·x_step:]; the sum, result[place:]."""
    signature = types.void(X, x, x_step, count, lower, upper, weights, result, place)

    def generate(context, builder, signature, values):
        vector = ir.VectorType(ir.FloatType(), LANES)
        X, lower, upper, weights, result = (
            _data(context, builder, signature, values, place) for place in (0, 4, 5, 6, 7)
        )
        total = cgutils.alloca_once_value(builder, vector(None))
        with cgutils.for_range(builder, values[3]) as loop:
            there = builder.gep(X, [builder.add(values[1], builder.mul(loop.index, values[2]))])
            at = (builder.gep(array, [loop.index]) for array in (lower, upper))
            number, inside = _windowed(builder, vector, there, *at)
            weight = _spread(builder, builder.load(builder.gep(weights, [loop.index])))
            before = builder.load(total)
            builder.store(builder.select(inside, builder.fadd(before, builder.fmul(weight, number)), before), total)
        to = builder.bitcast(builder.gep(result, [values[8]]), vector.as_pointer())
        builder.store(builder.load(total), to, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def variance_panel(_typing, X, x, x_step, count, sizes, divisor, rounding, result, place):
    """`entry_loops.variance` of LANES entries: the i-th block's are X[x + i·x_step:]; `divisor` is count."""
    signature = types.void(X, x, x_step, count, sizes, divisor, rounding, result, place)

    def generate(context, builder, signature, values):
        vector = ir.VectorType(ir.FloatType(), LANES)
        X, sizes, result = (_data(context, builder, signature, values, place) for place in (0, 4, 7))
        divisor, rounding = _spread(builder, values[5]), _spread(builder, values[6])
        fabs = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, (vector,)), f"llvm.fabs.v{LANES}f32"
        )

        def scaled(index):
            there = builder.gep(X, [builder.add(values[1], builder.mul(index, values[2]))])
            number = builder.load(builder.bitcast(there, vector.as_pointer()), align=4)
            return builder.fmul(_spread(builder, builder.load(builder.gep(sizes, [index]))), number)

        total, largest, squares = (cgutils.alloca_once_value(builder, vector(None)) for _ in range(3))
        with cgutils.for_range(builder, values[3]) as loop:
            number = scaled(loop.index)
            builder.store(builder.fadd(builder.load(total), number), total)
            size, before = builder.call(fabs, [number]), builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", size, before), size, before), largest)
        mean = builder.fdiv(builder.load(total), divisor)
        with cgutils.for_range(builder, values[3]) as loop:
            difference = builder.fsub(scaled(loop.index), mean)
            square = builder.fmul(difference, difference)
            builder.store(builder.fadd(builder.load(squares), square), squares)
        found, border = builder.fdiv(builder.load(squares), divisor), builder.fmul(rounding, builder.load(largest))
        nothing = builder.fcmp_ordered("<", found, builder.fmul(border, border))
        to = builder.bitcast(builder.gep(result, [values[8]]), vector.as_pointer())
        builder.store(builder.select(nothing, _spread(builder, ir.FloatType()(0.0)), found), to, align=4)
        return context.get_dummy_value()

    return signature, generate


def _elected_panel(by_count):
    """`entry_loops.elected` of LANES entries: the i-th block's are X[x + i·x_step:]; the result, result[place:]."""

    @intrinsic
    def elected_panel(_typing, X, x, x_step, count, lower, upper, votes, weights, shares, result, place):
        signature = types.void(X, x, x_step, count, lower, upper, votes, weights, shares, result, place)

        def generate(context, builder, signature, values):
            vector = ir.VectorType(ir.FloatType(), LANES)
            X, lower, upper, votes, weights, shares, result = (
                _data(context, builder, signature, values, place) for place in (0, 4, 5, 6, 7, 8, 9)
            )
            nothing, one = (_spread(builder, ir.FloatType()(number)) for number in (0.0, 1.0))
            minus_one = _spread(builder, ir.FloatType()(-1.0))

            def block(index):
                there = builder.gep(X, [builder.add(values[1], builder.mul(index, values[2]))])
                at = (builder.gep(array, [index]) for array in (lower, upper))
                number, inside = _windowed(builder, vector, there, *at)
                vote = _spread(builder, builder.load(builder.gep(votes, [index])))
                return number, inside, builder.fmul(vote, number)

            ballot = cgutils.alloca_once_value(builder, vector(None))
            with cgutils.for_range(builder, values[3]) as loop:
                _, inside, voted = block(loop.index)
                if by_count:
                    plus = builder.select(builder.fcmp_ordered(">", voted, nothing), one, nothing)
                    minus = builder.select(builder.fcmp_ordered("<", voted, nothing), one, nothing)
                    voted = builder.fsub(plus, minus)
                before = builder.load(ballot)
                builder.store(builder.select(inside, builder.fadd(before, voted), before), ballot)
            plus = builder.fcmp_ordered(">=", builder.load(ballot), nothing)
            majority = builder.select(plus, one, minus_one)
            total, divisor = (cgutils.alloca_once_value(builder, vector(None)) for _ in range(2))
            with cgutils.for_range(builder, values[3]) as loop:
                number, inside, voted = block(loop.index)
                agrees = builder.and_(inside, builder.fcmp_ordered(">", builder.fmul(voted, majority), nothing))
                weight, share = (
                    _spread(builder, builder.load(builder.gep(array, [loop.index]))) for array in (weights, shares)
                )
                for sum_, added in ((total, builder.fmul(weight, number)), (divisor, share)):
                    before = builder.load(sum_)
                    builder.store(builder.select(agrees, builder.fadd(before, added), before), sum_)
            divided_by = builder.load(divisor)
            empty = builder.fcmp_ordered("==", divided_by, nothing)
            quotient = builder.fdiv(builder.load(total), builder.select(empty, one, divided_by))
            to = builder.bitcast(builder.gep(result, [values[10]]), vector.as_pointer())
            builder.store(quotient, to, align=4)
            return context.get_dummy_value()

        return signature, generate

    return elected_panel


elected_by_sum = _elected_panel(by_count=False)
elected_by_count = _elected_panel(by_count=True)


@intrinsic
def first_bit(_typing, bits):
    """The place of the lowest bit of an int64 that is set."""
    return types.int64(types.int64), lambda _context, builder, _signature, values: builder.cttz(
        values[0], ir.IntType(1)(1)
    )


def _data(context, builder, signature, values, place):
    """The pointer to the first number of an array among the arguments."""
    return context.make_array(signature.args[place])(context, builder, values[place]).data


def _spread(builder, number):
    """A vector of LANES times the number."""
    undefined = ir.VectorType(ir.FloatType(), LANES)(ir.Undefined)
    lane = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return builder.shuffle_vector(lane, undefined, ir.VectorType(ir.IntType(32), LANES)([0] * LANES))
