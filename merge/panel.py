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


def _panel(adds, columns, rows=ROWS):
    """X[x + i·x_step + j] = Σₖ B[b + i·b_step + k·b_next]·A[a + k·a_step + j] of the flat float32 arrays A, B and X.

    For i < rows, j < columns and k < terms; `adds`: what was in X is the first term.
    """
    vectors = columns // LANES

    @intrinsic
    def panel(_typing, A, a, a_step, B, b, b_step, b_next, terms, X, x, x_step):
        signature = types.void(A, a, a_step, B, b, b_step, b_next, terms, X, x, x_step)

        def generate(context, builder, signature, values):
            vector = ir.VectorType(ir.FloatType(), LANES)
            A, B, X = (_data(context, builder, signature, values, place) for place in (0, 3, 8))
            a, a_step, b, b_step, b_next, terms, x, x_step = (values[place] for place in (1, 2, 4, 5, 6, 7, 9, 10))
            fma = _fma(builder, vector)

            def address(array, place, number):
                there = builder.gep(array, [builder.add(place, place.type(number))])
                return builder.bitcast(there, vector.as_pointer())

            places = [builder.add(x, builder.mul(x_step, x_step.type(i))) for i in range(rows)]
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
                for i in range(rows):
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
lanes = _panel(adds=False, columns=LANES, rows=1)


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
def sum_lanes(_typing, X, members, factors, first, last, Y, y):
    """Y[y:] = Σ factors[p]·X[LANES·members[p]:] over first ≤ p < last, LANES numbers each, of flat float32 arrays.

    `members` are int64. Each term is rounded once.
    """
    signature = types.void(X, members, factors, first, last, Y, y)

    def generate(context, builder, signature, values):
        vector = ir.VectorType(ir.FloatType(), LANES)
        X, members, factors, Y = (_data(context, builder, signature, values, place) for place in (0, 1, 2, 5))
        total = cgutils.alloca_once_value(builder, vector(None))
        fma = _fma(builder, vector)
        with cgutils.for_range_slice(builder, values[3], values[4], values[3].type(1)) as (place, _):
            member = builder.load(builder.gep(members, [place]))
            there = builder.gep(X, [builder.mul(member, member.type(LANES))])
            numbers = builder.load(builder.bitcast(there, vector.as_pointer()), align=4)
            factor = _spread(builder, builder.load(builder.gep(factors, [place])))
            builder.store(builder.call(fma, [factor, numbers, builder.load(total)]), total)
        to = builder.bitcast(builder.gep(Y, [values[6]]), vector.as_pointer())
        builder.store(builder.load(total), to, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def bracket_panel(_typing, x, place, low, high, inside):
    """What the numbers of a panel, in one piece of the float32 array x from a place on, are: int64 of

    bits 0 to 31: how many are above high in size; from 32: whether one of them is NaN. Which have low ≤ |x| ≤ high goes
    to the uint64 array `inside`, a bit for each; NaN is above all.
    """
    signature = types.int64(x, place, low, high, inside)

    def generate(context, builder, signature, values):
        vector, wide = ir.VectorType(ir.IntType(32), COLUMNS), ir.IntType(64)
        x, inside = (_data(context, builder, signature, values, place) for place in (0, 4))
        number = ir.IntType(32)
        # sizes of floats are ordered as their bits are
        low, high = (builder.bitcast(value, number) for value in values[2:4])
        first, span = _spread(builder, low, COLUMNS), _spread(builder, builder.sub(high, low), COLUMNS)
        without_sign = _spread(builder, number(0x7FFFFFFF), COLUMNS)
        above, largest, per_word, word = vector([0] * COLUMNS), vector([0] * COLUMNS), 64 // COLUMNS, None
        for row in range(ROWS):
            there = builder.gep(x, [builder.add(values[1], values[1].type(row * COLUMNS))])
            bits = builder.load(builder.bitcast(there, vector.as_pointer()), align=4)
            bits = builder.and_(bits, without_sign)
            over = builder.sub(bits, first)
            among = builder.bitcast(builder.icmp_unsigned("<=", over, span), ir.IntType(COLUMNS))
            among = builder.shl(builder.zext(among, wide), wide(row % per_word * COLUMNS))
            word = builder.or_(word, among) if row % per_word else among
            if row % per_word == per_word - 1:
                builder.store(word, builder.gep(inside, [wide(row // per_word)]))
            above = builder.add(above, builder.zext(builder.icmp_signed(">", over, span), vector))
            largest = builder.select(builder.icmp_signed(">", bits, largest), bits, largest)
        infinite = _spread(builder, number(0x7F800000), COLUMNS)
        nan = builder.bitcast(builder.icmp_signed(">", largest, infinite), ir.IntType(COLUMNS))
        nan = builder.zext(builder.icmp_unsigned("!=", nan, ir.IntType(COLUMNS)(0)), wide)
        add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(number, (vector,)), f"llvm.vector.reduce.add.v{COLUMNS}i32"
        )
        return builder.or_(builder.zext(builder.call(add, [above]), wide), builder.shl(nan, wide(32)))

    return signature, generate


def _windowed(builder, vector, number, lower, upper):
    """The numbers at a pointer, and which have lower ≤ |x| < upper, for the i-th of these borders."""
    x = builder.load(builder.bitcast(number, vector.as_pointer()), align=4)
    size = builder.call(_fabs(builder, vector), [x])
    not_below = builder.fcmp_ordered(">=", size, _spread(builder, builder.load(lower), vector.count))
    return x, builder.and_(
        not_below, builder.fcmp_ordered("<", size, _spread(builder, builder.load(upper), vector.count))
    )


def _sum_panel(columns):
    """`entry_loops.weighted_sum` of as many entries: the i-th block's are X[x + i·x_step:]; the sum, result[place:]."""

    @intrinsic
    def sum_panel(_typing, X, x, x_step, count, lower, upper, weights, result, place):
        signature = types.void(X, x, x_step, count, lower, upper, weights, result, place)

        def generate(context, builder, signature, values):
            vector = ir.VectorType(ir.FloatType(), columns)
            X, lower, upper, weights, result = (
                _data(context, builder, signature, values, place) for place in (0, 4, 5, 6, 7)
            )
            total = cgutils.alloca_once_value(builder, vector(None))
            with cgutils.for_range(builder, values[3]) as loop:
                there = builder.gep(X, [builder.add(values[1], builder.mul(loop.index, values[2]))])
                at = (builder.gep(array, [loop.index]) for array in (lower, upper))
                number, inside = _windowed(builder, vector, there, *at)
                weight = _spread(builder, builder.load(builder.gep(weights, [loop.index])), columns)
                before = builder.load(total)
                builder.store(builder.select(inside, builder.fadd(before, builder.fmul(weight, number)), before), total)
            to = builder.bitcast(builder.gep(result, [values[8]]), vector.as_pointer())
            builder.store(builder.load(total), to, align=4)
            return context.get_dummy_value()

        return signature, generate

    return sum_panel


def _variance_panel(columns, chooses=False):
    """`entry_loops.variance` of as many entries: the i-th block's are X[x + i·x_step:]; `share` is 1/count.

    `chooses`: what is in the result is 0 where the variance is below `least`, and else stays.
    """

    @intrinsic
    def variance_panel(_typing, X, x, x_step, count, sizes, share, rounding, least, result, place):
        signature = types.void(X, x, x_step, count, sizes, share, rounding, least, result, place)

        def generate(context, builder, signature, values):
            vector = ir.VectorType(ir.FloatType(), columns)
            X, sizes, result = (_data(context, builder, signature, values, place) for place in (0, 4, 8))
            share, rounding, least = (_spread(builder, values[place], columns) for place in (5, 6, 7))
            fabs = _fabs(builder, vector)

            def scaled(index):
                there = builder.gep(X, [builder.add(values[1], builder.mul(index, values[2]))])
                number = builder.load(builder.bitcast(there, vector.as_pointer()), align=4)
                size = builder.load(builder.gep(sizes, [index]))
                return builder.fmul(_spread(builder, size, columns), number)

            total, largest, squares = (cgutils.alloca_once_value(builder, vector(None)) for _ in range(3))
            with cgutils.for_range(builder, values[3]) as loop:
                number = scaled(loop.index)
                builder.store(builder.fadd(builder.load(total), number), total)
                size, before = builder.call(fabs, [number]), builder.load(largest)
                builder.store(builder.select(builder.fcmp_ordered(">", size, before), size, before), largest)
            mean = builder.fmul(builder.load(total), share)
            with cgutils.for_range(builder, values[3]) as loop:
                difference = builder.fsub(scaled(loop.index), mean)
                square = builder.fmul(difference, difference)
                builder.store(builder.fadd(builder.load(squares), square), squares)
            found, border = builder.fmul(builder.load(squares), share), builder.fmul(rounding, builder.load(largest))
            nothing = builder.fcmp_ordered("<", found, builder.fmul(border, border))
            to = builder.bitcast(builder.gep(result, [values[9]]), vector.as_pointer())
            found = builder.select(nothing, vector(None), found)
            if chooses:
                enough = builder.fcmp_ordered(">=", found, least)
                found = builder.select(enough, builder.load(to, align=4), vector(None))
            builder.store(found, to, align=4)
            return context.get_dummy_value()

        return signature, generate

    return variance_panel


@intrinsic
def add_energies(_typing, X, x, x_step, count, measure, place, least, result):
    """result[i·COLUMNS + j] += X[x + i·x_step + j]² where measure[place + j] ≥ least, for i < count and j < COLUMNS."""
    signature = types.void(X, x, x_step, count, measure, place, least, result)

    def generate(context, builder, signature, values):
        vector = ir.VectorType(ir.FloatType(), COLUMNS)
        X, measure, result = (_data(context, builder, signature, values, place) for place in (0, 4, 7))

        def address(array, place):
            return builder.bitcast(builder.gep(array, [place]), vector.as_pointer())

        measured = builder.load(address(measure, values[5]), align=4)
        enough = builder.fcmp_ordered(">=", measured, _spread(builder, values[6], COLUMNS))
        with cgutils.for_range(builder, values[3]) as loop:
            number = builder.load(address(X, builder.add(values[1], builder.mul(loop.index, values[2]))), align=4)
            to = address(result, builder.mul(loop.index, loop.index.type(COLUMNS)))
            before = builder.load(to, align=4)
            added = builder.fadd(before, builder.fmul(number, number))
            builder.store(builder.select(enough, added, before), to, align=4)
        return context.get_dummy_value()

    return signature, generate


def _elected_panel(by_count, columns):
    """`entry_loops.elected` of as many entries: the i-th block's are X[x + i·x_step:]; the result, result[place:].

    The sums of both signs are taken beside the vote, for one look at each entry.
    """

    @intrinsic
    def elected_panel(_typing, X, x, x_step, count, lower, upper, votes, weights, shares, result, place):
        signature = types.void(X, x, x_step, count, lower, upper, votes, weights, shares, result, place)

        def generate(context, builder, signature, values):
            vector = ir.VectorType(ir.FloatType(), columns)
            X, lower, upper, votes, weights, shares, result = (
                _data(context, builder, signature, values, place) for place in (0, 4, 5, 6, 7, 8, 9)
            )
            nothing, one = (_spread(builder, ir.FloatType()(number), columns) for number in (0.0, 1.0))
            ballot, *sums = (cgutils.alloca_once_value(builder, vector(None)) for _ in range(5))
            with cgutils.for_range(builder, values[3]) as loop:
                there = builder.gep(X, [builder.add(values[1], builder.mul(loop.index, values[2]))])
                at = (builder.gep(array, [loop.index]) for array in (lower, upper))
                number, inside = _windowed(builder, vector, there, *at)
                vote, weight, share = (
                    _spread(builder, builder.load(builder.gep(array, [loop.index])), columns)
                    for array in (votes, weights, shares)
                )
                voted = builder.fmul(vote, number)
                signs = [builder.and_(inside, builder.fcmp_ordered(sign, voted, nothing)) for sign in "><"]
                before = builder.load(ballot)
                if by_count:
                    for sign, change in zip(signs, (builder.fadd, builder.fsub), strict=True):
                        before = builder.select(sign, change(before, one), before)
                    builder.store(before, ballot)
                else:
                    builder.store(builder.select(inside, builder.fadd(before, voted), before), ballot)
                weighted = builder.fmul(weight, number)
                for place, (sign, added) in enumerate((sign, part) for sign in signs for part in (weighted, share)):
                    before = builder.load(sums[place])
                    builder.store(builder.select(sign, builder.fadd(before, added), before), sums[place])
            plus = builder.fcmp_ordered(">=", builder.load(ballot), nothing)
            of_plus, shared_by_plus, of_minus, shared_by_minus = (builder.load(sum_) for sum_ in sums)
            divided_by = builder.select(plus, shared_by_plus, shared_by_minus)
            empty = builder.fcmp_ordered("==", divided_by, nothing)
            total = builder.select(plus, of_plus, of_minus)
            quotient = builder.fdiv(total, builder.select(empty, one, divided_by))
            to = builder.bitcast(builder.gep(result, [values[10]]), vector.as_pointer())
            builder.store(quotient, to, align=4)
            return context.get_dummy_value()

        return signature, generate

    return elected_panel


sum_panel, sum_row = _sum_panel(LANES), _sum_panel(COLUMNS)
variance_panel, variance_row = _variance_panel(LANES), _variance_panel(COLUMNS)
choosing_row = _variance_panel(COLUMNS, chooses=True)
elected_by_sum, row_elected_by_sum = (_elected_panel(by_count=False, columns=width) for width in (LANES, COLUMNS))
elected_by_count, row_elected_by_count = (_elected_panel(by_count=True, columns=width) for width in (LANES, COLUMNS))


@intrinsic
def first_bit(_typing, bits):
    """The place of the lowest bit of an int64 that is set."""
    return types.int64(types.int64), lambda _context, builder, _signature, values: builder.cttz(
        values[0], ir.IntType(1)(1)
    )


def _data(context, builder, signature, values, place):
    """The pointer to the first number of an array among the arguments."""
    return context.make_array(signature.args[place])(context, builder, values[place]).data


def _fma(builder, vector):
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, (vector, vector, vector)), f"llvm.fma.v{vector.count}f32"
    )


def _fabs(builder, vector):
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, (vector,)), f"llvm.fabs.v{vector.count}f32"
    )


def _spread(builder, number, columns=LANES):
    """A vector of as many times the number."""
    undefined = ir.VectorType(number.type, columns)(ir.Undefined)
    lane = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return builder.shuffle_vector(lane, undefined, ir.VectorType(ir.IntType(32), columns)([0] * columns))
