"""The compiled loops that draw: which entries of a block stay, by a hash of a key, the row and the column.

Blocks X are (N, rows, columns) of float32, contiguous.
"""

from __future__ import annotations

import numpy as np

from merge.panel import compiled


@compiled
def row_keys(key, row):
    """Two keys (uint32) of a row: the number after `row` others of the SplitMix64 generator with that state."""
    mixed = np.uint64(key) + (np.uint64(row) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.uint32(mixed & np.uint64(0xFFFFFFFF)), np.uint32(mixed >> np.uint64(32))


@compiled
def drawn_at(first, second, column):
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
            first, second = row_keys(keys[i], row + r)
            drawn = result[i, r]
            for c in range(len(drawn)):
                drawn[c] = drawn_at(first, second, column + c)


@compiled
def erase(X, keys, row, column, last):
    """Zero the entries of X (N, rows, columns), which begin at a row and a column, whose numbers are above `last`."""
    for i in range(len(X)):
        for r in range(X.shape[1]):
            first, second = row_keys(keys[i], row + r)
            x = X[i, r]
            for c in range(len(x)):
                x[c] = x[c] if drawn_at(first, second, column + c) <= last else np.float32(0)


@compiled
def drop(X, keys, row, probabilities, rescale):
    """Keep of whole rows X (N, rows, d_in) what draws a number below its probability, divided by it to rescale; zero
    the others."""
    unit = np.float32(2.0**-24)
    for i in range(len(X)):
        for r in range(X.shape[1]):
            first, second = row_keys(keys[i], row + r)
            x, limits = X[i, r], probabilities[i, r]
            for c in range(len(x)):
                divisor = limits[c] if rescale else np.float32(1)
                number = np.float32(drawn_at(first, second, c) >> np.uint32(8)) * unit
                x[c] = x[c] / divisor if number < limits[c] else np.float32(0)
