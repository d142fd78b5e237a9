"""The compiled loops of the methods on single entries: blocks of float32 rows on a CPU, every entry touched once.

They do what `merge.rules` and `merge.rows` define; see there. Blocks X are (N, rows, columns), contiguous, of a size
that the cores' own caches hold: then what bounds a merge is the product BᵢAᵢ, and not what is done to its entries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from merge.panel import (
    COLUMNS,
    LANES,
    ROWS,
    adding_panel,
    elected_by_count,
    elected_by_sum,
    first_bit,
    fused,
    glance,
    panel,
    sum_panel,
    variance_panel,
)

PANEL_DIGEST = "e0ddabe41dadda91"
"""Of panel.py: numba's cache keeps what it compiled from that file until this one changes."""

# numpy's division: a check for zero in every step would keep the loops from being vectors
compiled = njit(cache=True, nogil=True, error_model="numpy")

CHUNK = 512
"""Entries whose sums are held at a time."""

TERMS = 512
"""Of a long sum that are added to each other before they are to what came before."""


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
def form_elected(A, B, starts, lower, upper, votes, weights, shares, by_count, height, width, result):
    """result (d_out, d_in) = `elected` of the blocks BᵢAᵢ, formed in tiles of this height and width and not kept."""
    count, (d_out, d_in) = len(starts) - 1, result.shape
    space, found = np.empty(count * height * width, A.dtype), np.empty(height * width, A.dtype)
    for row in range(0, d_out, height):
        rows = min(height, d_out - row)
        for column in range(0, d_in, width):
            columns = min(width, d_in - column)
            blocks = space[: count * rows * columns].reshape(count, rows, columns)
            form(A, B, starts, row, column, blocks)
            flat, tile = blocks.reshape(count, rows * columns), found[: rows * columns]
            elected(flat, lower, upper, votes, weights, shares, by_count, tile)
            result[row : row + rows, column : column + columns] = tile.reshape(rows, columns)


@compiled
def add_product(B, A, X):
    """X (rows, columns) += B·A with B: (rows, terms) and A: (terms, columns), narrow: a few times COLUMNS at most."""
    rows, columns = X.shape
    flat_A, flat_B = A.ravel(), B.ravel()
    whole_rows, whole_columns = rows - rows % ROWS, columns - columns % COLUMNS
    # long sums in parts, for less rounding
    part = np.zeros((ROWS, columns), X.dtype)
    flat_part = part.ravel()
    for first in range(0, A.shape[0], TERMS):
        terms = min(TERMS, A.shape[0] - first)
        for r in range(0, whole_rows, ROWS):
            part[:] = 0
            for c in range(0, whole_columns, COLUMNS):
                a, b = first * columns + c, r * B.shape[1] + first
                adding_panel(flat_A, a, columns, flat_B, b, B.shape[1], 1, terms, flat_part, c, columns)
            for i in range(ROWS):
                for c in range(whole_columns):
                    X[r + i, c] += part[i, c]
        for r in range(rows):
            for c in range(whole_columns if r < whole_rows else 0, columns):
                total = np.float32(0)
                for k in range(first, first + terms):
                    total = fused(B[r, k], A[k, c], total)
                X[r, c] += total


@compiled
def add_transposed_product(B, A, X):
    """X (rows, columns) += Bᵀ·A with B: (terms, rows), narrow, and A: (terms, columns), broad."""
    rows, columns = X.shape
    flat_A, flat_B, flat_X = A.ravel(), B.ravel(), X.ravel()
    whole_rows, whole_columns = rows - rows % ROWS, columns - columns % COLUMNS
    for c in range(0, whole_columns, COLUMNS):
        for r in range(0, whole_rows, ROWS):
            adding_panel(flat_A, c, columns, flat_B, r, 1, rows, len(A), flat_X, r * columns + c, columns)
    for r in range(rows):
        for c in range(whole_columns if r < whole_rows else 0, columns):
            total = X[r, c]
            for k in range(len(A)):
                total = fused(B[k, r], A[k, c], total)
            X[r, c] = total


@compiled
def bracketed(values, channels, low, high, above, at_high, at_low, inside, found):
    """How many |values| lie above each bracket, at its high and at its low border is added to `above`, `at_high` and
    `at_low`; those strictly between go to `inside`. Where both borders are one, it is the high one.

    Returns whether none of them is NaN.

    Args:
        values: (channels, m).
        channels, low, high: (P,) each bracket's channel and borders.
        above, at_high, at_low, found: (P,) counts so far.
        inside: (P, room) what is found goes to inside[p, found[p]:], with room for m + 1 more.
    """
    seen = np.int64(0)
    for p in range(len(channels)):
        lowest, highest, place = low[p], high[p], found[p]
        x, kept = values[channels[p]], inside[p]
        count, ties_high, ties_low = 0, 0, 0
        whole = len(x) - len(x) % LANES
        for start in range(0, whole, LANES):
            looked_at = glance(x, start, lowest, highest)
            seen |= looked_at
            count += (looked_at >> 16) & 0xFFFF
            bits = looked_at & 0xFFFF
            while bits != 0:
                size = abs(x[start + first_bit(bits)])
                bits &= bits - 1
                kept[place] = size
                place += (size > lowest) & (size < highest)
                ties_high += size == highest
                ties_low += (size == lowest) & (size < highest)
        for c in range(whole, len(x)):
            size = abs(x[c])
            kept[place] = size
            count += size > highest
            place += (size > lowest) & (size < highest)
            ties_high += size == highest
            ties_low += (size == lowest) & (size < highest)
            seen |= np.int64(size != size) << 32
        above[p] += count
        at_high[p] += ties_high
        at_low[p] += ties_low
        found[p] = place
    return (seen >> 32) == 0


@compiled
def products(A, B, rows, columns, result):
    """result (m,) = B[rows]·A[columns], row by row, of transposed A: (d_in, r) and B: (d_out, r)."""
    for s in range(len(rows)):
        b, a = B[rows[s]], A[columns[s]]
        total = result.dtype.type(0)
        for k in range(len(a)):
            total += b[k] * a[k]
        result[s] = total


@compiled
def _row_keys(key, row):
    """Two keys (uint32) of a row: the number after `row` others of the SplitMix64 generator with that state."""
    mixed = np.uint64(key) + (np.uint64(row) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.uint32(mixed & np.uint64(0xFFFFFFFF)), np.uint32(mixed >> np.uint64(32))


@compiled
def _drawn(first, second, column):
    """The random uint32 of a column of the row with these keys: a hash of its number, so that none waits for others."""
    x = np.uint32(first + np.uint32(column))
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x21F0AAAD))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(np.uint32(x + second) * np.uint32(0x735A2D97))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x31848BAB))
    return np.uint32(x ^ (x >> np.uint32(14)))


@compiled
def draw(keys, row, column, result):
    """result (N, rows, columns) uint32 = the random numbers of the entries from a row and a column on.

    Args:
        keys: (N,) uint64, of the blocks.
    """
    for i in range(len(result)):
        for r in range(result.shape[1]):
            first, second = _row_keys(keys[i], row + r)
            drawn = result[i, r]
            for c in range(len(drawn)):
                drawn[c] = _drawn(first, second, column + c)


@compiled
def erase(X, keys, row, column, last):
    """Zero the entries of X (N, rows, columns), which begin at a row and a column, whose numbers are above `last`."""
    for i in range(len(X)):
        for r in range(X.shape[1]):
            first, second = _row_keys(keys[i], row + r)
            x = X[i, r]
            for c in range(len(x)):
                x[c] = x[c] if _drawn(first, second, column + c) <= last else np.float32(0)


@compiled
def short_keys(X, place_bits, keys):
    """Integers (rows, columns) that order the |x| of a row by size as far as 32 bits can tell, then by place.

    The size is a whole number of parts of the largest; the place is in the lowest bits.
    """
    # no more than a float32 counts exactly
    parts = np.float32((1 << min(32 - place_bits, 22)) - 2)
    for r in range(len(X)):
        x, row = X[r], keys[r]
        bits, largest_bits = x.view(np.uint32), np.zeros(1, np.uint32)
        found = np.uint32(0)
        for c in range(len(x)):
            found = max(found, np.uint32(bits[c] & np.uint32(0x7FFFFFFF)))
        largest_bits[0] = found
        largest = largest_bits.view(np.float32)[0]
        scale = parts / largest if largest > 0 else np.float32(0)
        scale = scale if scale < np.inf else np.float32(0)
        for c in range(len(x)):
            row[c] = np.uint32(np.uint32(np.int32(abs(x[c]) * scale)) << np.uint32(place_bits)) | np.uint32(c)


@compiled
def by_short_keys(X, place_bits, keys, ramp, result, done):
    """result (rows, columns) = ramp[rank] of each entry of X in its row by |x|, equal ones by place.

    Entries that the keys could not tell apart are neighbours there, and change places until they are in order; where
    that takes long, `done` (rows,) is false.

    Args:
        keys: `short_keys`, sorted; their order changes.
        ramp: (columns,).
    """
    mask = np.uint32((1 << place_bits) - 1)
    close = np.zeros(CHUNK, np.uint8)
    words = close.view(np.uint64)
    columns = X.shape[1]
    for r in range(len(X)):
        x, row, found = X[r], keys[r], result[r]
        moves, allowed = 0, 8 * columns
        for start in range(1, columns, CHUNK):
            one, other = row[start - 1 : columns - 1], row[start : start + CHUNK]
            for c in range(len(other)):
                close[c] = (one[c] ^ other[c]) <= mask
            for c in range(len(other), CHUNK):
                close[c] = 0
            for word in range(len(words)):
                if words[word] == 0:
                    continue
                for c in range(start + 8 * word, min(start + 8 * word + 8, columns)):
                    key, to = row[c], c
                    size = abs(x[key & mask])
                    while to > 0 and (row[to - 1] ^ key) <= mask and abs(x[row[to - 1] & mask]) > size:
                        row[to] = row[to - 1]
                        to -= 1
                    row[to] = key
                    moves += c - to
                    if moves > allowed:
                        break
            if moves > allowed:
                break
        done[r] = moves <= allowed
        for rank in range(columns):
            found[row[rank] & mask] = ramp[rank]


@compiled
def long_keys(x, keys):
    """As `short_keys` of one row (columns,), exactly: the bits of the float, then the place."""
    bits = x.view(np.uint32)
    for c in range(len(bits)):
        keys[c] = (np.int64(bits[c] & np.uint32(0x7FFFFFFF)) << 32) | c


@compiled
def drop(X, keys, row, probabilities, rescale):
    """Keep of whole rows X (N, rows, d_in) what draws a number below its probability, divided by it to rescale; zero
    the others."""
    unit = np.float32(2.0**-24)
    for i in range(len(X)):
        for r in range(X.shape[1]):
            first, second = _row_keys(keys[i], row + r)
            x, limits = X[i, r], probabilities[i, r]
            for c in range(len(x)):
                divisor = limits[c] if rescale else np.float32(1)
                number = np.float32(_drawn(first, second, c) >> np.uint32(8)) * unit
                x[c] = x[c] / divisor if number < limits[c] else np.float32(0)


@compiled
def variance(X, sizes, result):
    """result (m,) = the variance of sizesᵢ·xᵢ over the blocks, of flattened X: (N, m); 0 where it is rounding."""
    count, size = X.shape
    # the rounding of a mean, in parts of the largest of its terms
    number, rounding = np.float32(count), np.float32(count * 2.0**-23)
    whole, flat_X = size - size % LANES, X.ravel()
    for c in range(0, whole, LANES):
        variance_panel(flat_X, c, size, count, sizes, number, rounding, result, c)
    for c in range(whole, size):
        mean, squares, largest = np.float32(0), np.float32(0), np.float32(0)
        for i in range(count):
            mean += sizes[i] * X[i, c]
            largest = max(largest, abs(sizes[i] * X[i, c]))
        mean /= number
        for i in range(count):
            squares += (sizes[i] * X[i, c] - mean) ** 2
        found, border = squares / number, (rounding * largest) ** 2
        result[c] = np.float32(0) if found < border else found


@compiled
def energies(X, chosen, result):
    """result (N,) += Σ x² over the chosen (m,) places, of flattened X: (N, m)."""
    partial = np.empty(CHUNK, X.dtype)
    for i in range(len(X)):
        for c in range(CHUNK):
            partial[c] = X.dtype.type(0)
        for start in range(0, X.shape[1], CHUNK):
            x, here = X[i, start : start + CHUNK], chosen[start : start + CHUNK]
            for c in range(len(x)):
                partial[c] += x[c] * x[c] if here[c] else X.dtype.type(0)
        result[i] += partial.sum()
