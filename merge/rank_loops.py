"""The compiled loops that rank the |entries| of each row of a block (rows, columns) of float32."""

from __future__ import annotations

import numpy as np

from merge.panel import compiled

CHUNK = 512
"""Keys that are compared at a time."""


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
