"""The compiled loops on strips (`merge.strips`): the entries of all deltas are formed in panels and used there.

A panel of eight deltas is there only in a core's first cache, where what is done to its entries costs as much as its
operations do. Entries are rounded as those of `entry_loops.form`.
"""

from __future__ import annotations

import numpy as np

from merge.mask_loops import drawn_at, row_keys
from merge.panel import (
    COLUMNS,
    LANES,
    ROWS,
    add_energies,
    adding_half,
    adding_panel,
    bracket_panel,
    choosing_row,
    compiled,
    first_bit,
    fused,
    lanes,
    panel,
    row_elected_by_count,
    row_elected_by_sum,
    sum_row,
    variance_row,
)

PANEL_DIGEST = "9d703af77a899bd1"
MASK_DIGEST = "022cc137d018cd5a"
"""Of panel.py and of mask_loops.py: numba's cache keeps what it compiled from them until this file changes."""

SUM, BY_SUM, BY_COUNT = 0, 1, 2
"""What becomes of the entries of one place: their sum, or the sum of those of the elected sign."""

PANEL = ROWS * COLUMNS
TERMS = 512
"""Of a long sum that are added to each other before they are to what came before."""


@compiled
def _form(flat_A, flat_B, starts, strip, row, X):
    """X (N · PANEL,) = the entries of all deltas in the panel of a strip that begins at a row."""
    n = starts[-1]
    for i in range(len(starts) - 1):
        first, terms = starts[i], starts[i + 1] - starts[i]
        a, b = (strip * n + first) * COLUMNS, row * n + first
        panel(flat_A, a, COLUMNS, flat_B, b, n, 1, terms, X, i * PANEL, COLUMNS)


@compiled
def _erase(X, keys, row, column, last):
    """Zero the entries of the panels X (N, ROWS, COLUMNS) whose numbers are above `last`; keys: (N, rows, 2)."""
    for i in range(len(keys)):
        for r in range(ROWS):
            first, second = keys[i, row + r, 0], keys[i, row + r, 1]
            for c in range(COLUMNS):
                X[i, r, c] = X[i, r, c] if drawn_at(first, second, column + c) <= last else np.float32(0)


@compiled
def merge(A, B, starts, row, rule, lower, upper, votes, weights, shares, keys, last, sizes, least, block):
    """block (strips, rows, COLUMNS) = the rows of the merged matrix from a row on.

    Of each place the entries, without those that are erased, are summed as `rule` says (`entry_loops.weighted_sum`,
    `entry_loops.elected`), where the variance of sizesᵢ·xᵢ is `least` or more; the others are 0.

    Args:
        A, B, starts: of `strips.Strips`.
        lower, upper, votes, weights, shares, sizes: (N,).
        keys: (N,) uint64, as in `mask_loops.erase`, or none: then nothing is erased.
        least: 0 for all places.
    """
    count, rows = len(starts) - 1, block.shape[1]
    flat_A, flat_B, flat_block = A.ravel(), B.ravel(), block.ravel()
    X = np.empty(count * PANEL, np.float32)
    panels = X.reshape(count, ROWS, COLUMNS)
    share, rounding = np.float32(1 / count), np.float32(count * 2.0**-23)
    of_rows = np.empty((len(keys), rows, 2), np.uint32)
    for i in range(len(keys)):
        for r in range(rows):
            of_rows[i, r, 0], of_rows[i, r, 1] = row_keys(keys[i], row + r)
    for strip in range(len(A)):
        for top in range(0, rows, ROWS):
            _form(flat_A, flat_B, starts, strip, row + top, X)
            _erase(panels, of_rows, top, strip * COLUMNS, last)
            for r in range(ROWS):
                x, to = r * COLUMNS, (strip * rows + top + r) * COLUMNS
                if rule == SUM:
                    sum_row(X, x, PANEL, count, lower, upper, weights, flat_block, to)
                elif rule == BY_SUM:
                    row_elected_by_sum(X, x, PANEL, count, lower, upper, votes, weights, shares, flat_block, to)
                else:
                    row_elected_by_count(X, x, PANEL, count, lower, upper, votes, weights, shares, flat_block, to)
                if least > 0:
                    choosing_row(X, x, PANEL, count, sizes, share, rounding, least, flat_block, to)


@compiled
def _add_sums(partial, result):
    """result (N,) += the sums of the rows of `partial`, which begins anew."""
    for i in range(len(result)):
        result[i] += partial[i].sum()
    partial[:] = 0


@compiled
def energies(A, B, starts, sizes, least, result):
    """result (N,) += the Σ x² of each delta over the places where the variance of sizesᵢ·xᵢ is `least` or more."""
    count = len(starts) - 1
    flat_A, flat_B = A.ravel(), B.ravel()
    X, varied = np.empty(count * PANEL, np.float32), np.empty(PANEL, np.float32)
    share, rounding = np.float32(1 / count), np.float32(count * 2.0**-23)
    partial = np.zeros((count, COLUMNS), np.float32)
    flat_partial = partial.ravel()
    for strip in range(len(A)):
        for row in range(0, len(B), ROWS):
            _form(flat_A, flat_B, starts, strip, row, X)
            for x in range(0, PANEL, COLUMNS):
                variance_row(X, x, PANEL, count, sizes, share, rounding, np.float32(0), varied, x)
                add_energies(X, x, PANEL, count, varied, x, least, flat_partial)
            if row % TERMS == 0 or row + ROWS >= len(B):
                _add_sums(partial, result)


@compiled
def _list(among, first, width, places, listed):
    """Append those of a panel's places whose bits are set, where there is room, and count them all."""
    for word in range(len(among)):
        bits = np.int64(among[word])
        while bits != 0:
            bit = 64 * word + first_bit(bits)
            bits &= bits - 1
            if listed[0] < len(places):
                places[listed[0]] = first + bit // COLUMNS * width + bit % COLUMNS
            listed[0] += 1


@compiled
def bracketed(
    A,
    B,
    starts,
    row,
    rows,
    every,
    sizes,
    channels,
    low,
    high,
    above,
    at_high,
    at_low,
    inside,
    found,
    energies,
    places,
    listed,
):
    """How many |entries| of some rows lie above each bracket, at its high and at its low border is added to `above`,
    `at_high` and `at_low`; those strictly between go to `inside`. Where both borders are one, it is the high one.

    Returns whether none of them is NaN.

    Args:
        every: of so many panels one is looked at, in each strip and in each row.
        sizes: (N,), and the one channel is the variance of sizesᵢ·xᵢ; or none, and the channels are the deltas.
        channels, low, high: (P,) each bracket's channel and borders.
        above, at_high, at_low, found: (P,) counts so far.
        inside: (P, room) what is found goes to inside[p, found[p]:], with room for all and one more.
        energies, places, listed: (N,) += Σ x² of each delta where the variance is above the bracket, and the places
            row · strips · COLUMNS + column where it is in it or at a border, as many as there is room for; (1,) how
            many. Or none of the three.
    """
    count = len(starts) - 1
    flat_A, flat_B = A.ravel(), B.ravel()
    X, measured = np.empty((count + 1) * PANEL, np.float32), len(sizes) > 0
    share, rounding = np.float32(1 / count), np.float32(count * 2.0**-23)
    seen, among = np.int64(0), np.empty(PANEL // 64, np.uint64)
    tallies, beyond = len(energies) > 0, np.nextafter(high[0], np.float32(np.inf))
    partial, width = np.zeros((count, COLUMNS), np.float32), len(A) * COLUMNS
    flat_partial = partial.ravel()
    for strip in range(len(A)):
        # 5 has no divisor in common with the powers of two
        for top in range(row, row + rows, ROWS):
            if (strip + 5 * (top // ROWS)) % every != 0:
                continue
            _form(flat_A, flat_B, starts, strip, top, X)
            if measured:
                for x in range(0, PANEL, COLUMNS):
                    variance_row(X, x, PANEL, count, sizes, share, rounding, np.float32(0), X, count * PANEL + x)
                    if tallies:
                        add_energies(X, x, PANEL, count, X, count * PANEL + x, beyond, flat_partial)
            for p in range(len(channels)):
                x = (count if measured else channels[p]) * PANEL
                lowest, highest, place = low[p], high[p], found[p]
                looked_at = bracket_panel(X, x, lowest, highest, among)
                seen |= looked_at
                if tallies:
                    _list(among, top * width + strip * COLUMNS, width, places, listed)
                ties_high, ties_low = 0, 0
                for word in range(len(among)):
                    bits = np.int64(among[word])
                    while bits != 0:
                        size = abs(X[x + 64 * word + first_bit(bits)])
                        bits &= bits - 1
                        inside[p, place] = size
                        place += (size > lowest) & (size < highest)
                        ties_high += size == highest
                        ties_low += (size == lowest) & (size < highest)
                above[p] += looked_at & 0xFFFFFFFF
                at_high[p] += ties_high
                at_low[p] += ties_low
                found[p] = place
        if tallies and (strip % 8 == 7 or strip == len(A) - 1):
            _add_sums(partial, energies)
    return (seen >> 32) == 0


@compiled
def gathered(A, B, starts, places, result):
    """result (N, m) = the entries of each delta at the places row · strips · COLUMNS + column, rounded as in panels."""
    width = len(A) * COLUMNS
    for m in range(len(places)):
        row, column = places[m] // width, places[m] % width
        strip, c = column // COLUMNS, column % COLUMNS
        for i in range(len(starts) - 1):
            total = np.float32(0)
            for k in range(starts[i], starts[i + 1]):
                total = fused(B[row, k], A[strip, k, c], total)
            result[i, m] = total


@compiled
def sampled(A, B, starts, places, result):
    """result (N, d_out, times, LANES) = neighbours in each row, the first of them at the places (d_out, times).

    Args:
        A: (n, d_in), at least LANES of them; B: (d_out, n).
    """
    flat_A, flat_B, flat = A.ravel(), B.ravel(), result.ravel()
    d_out, times = places.shape
    for r in range(d_out):
        for t in range(times):
            for i in range(len(starts) - 1):
                first, terms = starts[i], starts[i + 1] - starts[i]
                a, to = first * A.shape[1] + places[r, t], ((i * d_out + r) * times + t) * LANES
                lanes(flat_A, a, A.shape[1], flat_B, r * B.shape[1] + first, 1, 1, terms, flat, to, LANES)


@compiled
def project(block, Q, Y, Z):
    """Y (rows, width) = M·Q of the block M (strips, rows, COLUMNS), and Z (strips, width, COLUMNS) += (MᵀY)ᵀ.

    Returns ‖M‖².

    Args:
        Q: (strips · COLUMNS, width); the width is a multiple of LANES.
    """
    (rows, width), strips = Y.shape, len(block)
    flat, flat_Q, flat_Y, flat_Z = block.ravel(), Q.ravel(), Y.ravel(), Z.ravel()
    part, squares = np.empty(rows * width, np.float32), np.empty(COLUMNS, np.float32)
    energy, whole = 0.0, width - width % COLUMNS
    Y[:] = 0
    # long sums in parts, for less rounding
    for begin in range(0, strips, TERMS // COLUMNS):
        part[:] = 0
        for strip in range(begin, min(begin + TERMS // COLUMNS, strips)):
            first = strip * rows * COLUMNS
            for r in range(0, rows, ROWS):
                b = first + r * COLUMNS
                for c in range(0, whole, COLUMNS):
                    q = strip * COLUMNS * width + c
                    adding_panel(flat_Q, q, width, flat, b, COLUMNS, 1, COLUMNS, part, r * width + c, width)
                if whole < width:
                    q = strip * COLUMNS * width + whole
                    adding_half(flat_Q, q, width, flat, b, COLUMNS, 1, COLUMNS, part, r * width + whole, width)
            squares[:] = 0
            for start in range(first, first + rows * COLUMNS, COLUMNS):
                x = flat[start : start + COLUMNS]
                for c in range(COLUMNS):
                    squares[c] += x[c] * x[c]
            for c in range(COLUMNS):
                energy += squares[c]
        for y in range(rows * width):
            flat_Y[y] += part[y]
    for strip in range(strips):
        for j in range(0, width, ROWS):
            z = (strip * width + j) * COLUMNS
            adding_panel(flat, strip * rows * COLUMNS, COLUMNS, flat_Y, j, 1, width, rows, flat_Z, z, COLUMNS)
    return energy
