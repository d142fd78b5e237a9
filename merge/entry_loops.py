"""The compiled loops of the methods on single entries: blocks of float32 rows on a CPU, every entry touched once.

They do what `merge.rules` and `merge.rows` define; see there. Blocks X are (N, rows, columns), contiguous, of a size
that the cores' own caches hold: then what bounds a merge is the product BᵢAᵢ, and not what is done to its entries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True)

CHUNK = 256
"""Entries whose sums are held at a time."""

GLANCE = 32
"""Entries of which one count says whether any has to be looked at."""


@compiled
def weighted_sum(X, lower, upper, weights, result):
    """result (m,) = Σ wᵢxᵢ over lowerᵢ ≤ |xᵢ| < upperᵢ, all (N,), of flattened blocks X: (N, m)."""
    size = X.shape[1]
    nothing = X.dtype.type(0)
    for start in range(0, size, CHUNK):
        width = min(CHUNK, size - start)
        total = result[start : start + width]
        for c in range(width):
            total[c] = nothing
        for i in range(len(X)):
            low, high, weight = lower[i], upper[i], weights[i]
            x = X[i, start : start + width]
            for c in range(width):
                size_c = abs(x[c])
                total[c] += weight * x[c] if (size_c >= low) & (size_c < high) else nothing


@compiled
def elected(X, lower, upper, votes, weights, shares, by_count, result):
    """As `weighted_sum` over the entries of the elected sign, divided by the sum of their shares (1 where that is 0).

    The sign is that of Σ votesᵢ·xᵢ, or of the count of their signs; 0 elects plus.
    """
    size = X.shape[1]
    nothing, one = X.dtype.type(0), X.dtype.type(1)
    sign = np.empty(CHUNK, X.dtype)
    divisor = np.empty(CHUNK, X.dtype)
    for start in range(0, size, CHUNK):
        width = min(CHUNK, size - start)
        total = result[start : start + width]
        for c in range(width):
            sign[c] = divisor[c] = total[c] = nothing
        for i in range(len(X)):
            low, high, vote = lower[i], upper[i], votes[i]
            x = X[i, start : start + width]
            if by_count:
                for c in range(width):
                    size_c = abs(x[c])
                    voted = vote * x[c] if (size_c >= low) & (size_c < high) else nothing
                    sign[c] += (one if voted > 0 else nothing) - (one if voted < 0 else nothing)
            else:
                for c in range(width):
                    size_c = abs(x[c])
                    sign[c] += vote * x[c] if (size_c >= low) & (size_c < high) else nothing
        for c in range(width):
            sign[c] = one if sign[c] >= 0 else -one
        for i in range(len(X)):
            low, high, vote, weight, share = lower[i], upper[i], votes[i], weights[i], shares[i]
            x = X[i, start : start + width]
            for c in range(width):
                size_c = abs(x[c])
                agrees = (size_c >= low) & (size_c < high) & (vote * x[c] * sign[c] > 0)
                total[c] += weight * x[c] if agrees else nothing
                divisor[c] += share if agrees else nothing
        for c in range(width):
            total[c] /= divisor[c] if divisor[c] != 0 else one


@compiled
def bracketed(values, low, high, inside, found):
    """How many of the |values| (m,) are above `high`; those from low to high go to inside[found:]. Returns both counts.

    `inside` must have room for all values and GLANCE more.
    """
    above = 0
    for start in range(0, len(values), GLANCE):
        x = values[start : start + GLANCE]
        higher, not_lower = np.int32(0), np.int32(0)
        for c in range(len(x)):
            size = abs(x[c])
            higher += np.int32(size > high)
            not_lower += np.int32(size >= low)
        above += higher
        if higher != not_lower:
            for c in range(len(x)):
                size = abs(x[c])
                inside[found] = size
                found += (size >= low) & (size <= high)
    return above, found


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
def below(words, limit, result):
    """Whether each of the first numbers that numpy's SFC64 generator draws, of 24 bits each, is below `limit`.

    Args:
        words: (3,) uint64 that the generator is seeded with.
        result: (m,) bool.
    """
    a, b, c, counter = words[0], words[1], words[2], np.uint64(1)
    low_half = np.uint64(0xFFFFFFFF)
    # what comes first is thrown away; each step after gives two numbers
    for place in range(-24, len(result), 2):
        drawn = a + b + counter
        counter += np.uint64(1)
        a = b ^ (b >> np.uint64(11))
        b = c + (c << np.uint64(3))
        c = ((c << np.uint64(24)) | (c >> np.uint64(40))) + drawn
        if place >= 0:
            result[place] = ((drawn & low_half) >> np.uint64(8)) < limit
            if place + 1 < len(result):
                result[place + 1] = (drawn >> np.uint64(40)) < limit


@compiled
def erase(X, keep, first_column):
    """Zero the entries of X (N, rows, columns) that `keep` (N, rows, d_in), from the first column on, does not keep."""
    columns = X.shape[2]
    for i in range(len(X)):
        for r in range(X.shape[1]):
            x, kept = X[i, r], keep[i, r, first_column : first_column + columns]
            for c in range(columns):
                x[c] = x[c] if kept[c] else X.dtype.type(0)


@compiled
def place_keys(X, keys):
    """Integers (rows, columns) that order the |x| of a row by size, equal ones by place: the bits, then the place."""
    for r in range(len(X)):
        bits, row = X[r].view(np.uint32), keys[r]
        for c in range(len(bits)):
            row[c] = (np.int64(bits[c] & np.uint32(0x7FFFFFFF)) << 32) | c


@compiled
def drop_by_rank(X, keys, uniform, lowest, range_, rescale):
    """Keep of X (rows, columns) the entries whose uniform number is below their probability; zero the others.

    The probability rises with the rank of a key in its row of sorted keys: lowest + range·rank/(columns − 1).
    """
    last = np.float32(max(X.shape[1] - 1, 1))
    for r in range(len(X)):
        x, drawn = X[r], uniform[r]
        for rank in range(len(x)):
            place = keys[r, rank] & 0xFFFFFFFF
            probability = lowest + range_ * (np.float32(rank) / last)
            if drawn[place] >= probability:
                x[place] = np.float32(0)
            elif rescale:
                x[place] /= probability
