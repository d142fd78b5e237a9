"""The compiled loops of the methods on single entries: blocks of float32 rows on a CPU, every entry touched once.

They do what `merge.rules` and `merge.rows` define; see there. Blocks X are (N, rows, columns), contiguous, of a size
that the cores' own caches hold: then what bounds a merge is the product BᵢAᵢ, and not what is done to its entries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# numpy's division: a check for zero in every step would keep the loops from being vectors
compiled = njit(cache=True, nogil=True, error_model="numpy")

CHUNK = 256
"""Entries whose sums are held at a time."""

GLANCE = 32
"""Entries of which one count says whether any has to be looked at."""

LANES = 16
"""Random streams that step together, in the vectors of the processor."""

STEPS = 64
"""Steps of theirs before the numbers are handed out."""


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
def bracketed(values, channels, low, high, above, at_high, at_low, inside, found):
    """How many |values| lie above each bracket, at its high and at its low border is added to `above`, `at_high` and
    `at_low`; those strictly between go to `inside`. Where both borders are one, it is the high one.

    Args:
        values: (channels, m).
        channels, low, high: (P,) each bracket's channel and borders.
        above, at_high, at_low, found: (P,) counts so far.
        inside: (P, room) what is found goes to inside[p, found[p]:], with room for m + GLANCE more.
    """
    for p in range(len(channels)):
        lowest, highest, place = low[p], high[p], found[p]
        channel, kept = channels[p], inside[p]
        for start in range(0, values.shape[1], GLANCE):
            x = values[channel, start : start + GLANCE]
            higher, not_lower = np.int32(0), np.int32(0)
            for c in range(len(x)):
                size = abs(x[c])
                higher += np.int32(size > highest)
                not_lower += np.int32(size >= lowest)
            above[p] += higher
            if higher != not_lower:
                for c in range(len(x)):
                    size = abs(x[c])
                    kept[place] = size
                    place += (size > lowest) & (size < highest)
                    at_high[p] += size == highest
                    at_low[p] += (size == lowest) & (size < highest)
        found[p] = place


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
def _seeded(words, first):
    """States (3, LANES) of numpy's SFC64 generators of the streams from the first on; lanes past the last idle."""
    state = np.zeros((3, LANES), np.uint64)
    for lane in range(min(LANES, len(words) - first)):
        for part in range(3):
            state[part, lane] = words[first + lane, part]
    # what comes first is thrown away
    _step(state, np.uint64(1), np.empty((12, LANES), np.uint64))
    return state


@compiled
def _step(state, counter, drawn):
    """Let all lanes draw (steps, LANES) numbers of 64 bits; `counter` counts from 1."""
    a, b, c = state[0], state[1], state[2]
    for step in range(len(drawn)):
        for lane in range(LANES):
            number = a[lane] + b[lane] + counter
            a[lane] = b[lane] ^ (b[lane] >> np.uint64(11))
            b[lane] = c[lane] + (c[lane] << np.uint64(3))
            c[lane] = ((c[lane] << np.uint64(24)) | (c[lane] >> np.uint64(40))) + number
            drawn[step, lane] = number
        counter += np.uint64(1)


@compiled
def uniform(words, result):
    """The first numbers in [0, 1) that numpy's SFC64 generators draw as float32: 24 bits each, two from a step.

    Args:
        words: (streams, 3) uint64 that a generator is seeded with.
        result: (streams, m) float32, m a multiple of 2.
    """
    unit = np.float32(2.0**-24)
    drawn = np.empty((STEPS, LANES), np.uint64)
    for first in range(0, len(words), LANES):
        state = _seeded(words, first)
        for start in range(0, result.shape[1], 2 * STEPS):
            _step(state, np.uint64(13 + start // 2), drawn)
            for lane in range(min(LANES, len(words) - first)):
                part = result[first + lane, start : start + 2 * STEPS]
                for step in range(len(part) // 2):
                    number = drawn[step, lane]
                    part[2 * step] = np.float32((number & np.uint64(0xFFFFFFFF)) >> np.uint64(8)) * unit
                    part[2 * step + 1] = np.float32(number >> np.uint64(40)) * unit


@compiled
def below(words, limit, result):
    """Whether the numbers of `uniform` are below limit·2⁻²⁴; result: (streams, m) bool."""
    drawn = np.empty((STEPS, LANES), np.uint64)
    for first in range(0, len(words), LANES):
        state = _seeded(words, first)
        for start in range(0, result.shape[1], 2 * STEPS):
            _step(state, np.uint64(13 + start // 2), drawn)
            for lane in range(min(LANES, len(words) - first)):
                part = result[first + lane, start : start + 2 * STEPS]
                for step in range(len(part) // 2):
                    number = drawn[step, lane]
                    part[2 * step] = ((number & np.uint64(0xFFFFFFFF)) >> np.uint64(8)) < limit
                    part[2 * step + 1] = (number >> np.uint64(40)) < limit


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
def by_rank(keys, lowest, range_, result):
    """Probabilities (rows, columns) that rise with the rank of a key in its row of sorted keys.

    They are lowest + range·rank/(columns − 1).
    """
    columns = keys.shape[1]
    last = np.float32(max(columns - 1, 1))
    for r in range(len(keys)):
        row, probabilities = keys[r], result[r]
        for rank in range(columns):
            probabilities[np.uint32(row[rank] & 0xFFFFFFFF)] = lowest + range_ * (np.float32(rank) / last)


@compiled
def drop(x, drawn, probabilities, rescale):
    """Keep of x (m,) what draws a number below its probability, divided by it to rescale; zero the others."""
    for c in range(len(x)):
        divisor = probabilities[c] if rescale else np.float32(1)
        x[c] = x[c] / divisor if drawn[c] < probabilities[c] else np.float32(0)


@compiled
def variance(X, sizes, result):
    """result (m,) = the variance of sizesᵢ·xᵢ over the blocks, of flattened X: (N, m)."""
    count = X.dtype.type(len(X))
    mean = np.empty(CHUNK, X.dtype)
    for start in range(0, X.shape[1], CHUNK):
        total = result[start : start + CHUNK]
        for c in range(len(total)):
            mean[c] = total[c] = X.dtype.type(0)
        for i in range(len(X)):
            x, size = X[i, start : start + CHUNK], sizes[i]
            for c in range(len(total)):
                mean[c] += size * x[c]
        for c in range(len(total)):
            mean[c] /= count
        for i in range(len(X)):
            x, size = X[i, start : start + CHUNK], sizes[i]
            for c in range(len(total)):
                difference = size * x[c] - mean[c]
                total[c] += difference * difference
        for c in range(len(total)):
            total[c] /= count


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
