"""Which layer and which head of one model is which of another: likeness of representations, and assignments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def linear_cka(first: Matrix, second: Matrix) -> float:
    """Linear CKA of two representations (n, d) and (n, d') of the same n texts (arXiv:1905.00414, eq. of section 3): 1
    for representations that differ by a rotation and a scale, 0 where one is constant."""
    one, other = first - first.mean(axis=0), second - second.mean(axis=0)
    norms = float(np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other))
    return float(np.square(np.linalg.norm(one.T @ other)) / norms) if norms > 0 else 0.0


def monotone_match(likeness: Matrix) -> list[tuple[int, int]]:
    """The pairs (row, column) of the largest sum, rising in both: every row is matched if there are no more rows than
    columns, else every column.

    Args:
        likeness: (rows, columns).
    """
    if likeness.shape[0] > likeness.shape[1]:
        return [(row, column) for column, row in monotone_match(likeness.T)]
    rows, columns = likeness.shape
    best = np.full((rows + 1, columns + 1), -np.inf)
    best[0] = 0.0
    for row, column in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        best[row, column] = max(best[row, column - 1], best[row - 1, column - 1] + likeness[row - 1, column - 1])
    found = []
    column = columns
    for row in range(rows, 0, -1):
        while best[row, column] == best[row, column - 1]:
            column -= 1
        found.append((row - 1, column - 1))
        column -= 1
    return found[::-1]


def assign(gain: Matrix) -> list[int]:
    """A column for every row, no column twice, with the largest sum of gains (Hungarian method, Kuhn 1955).

    Args:
        gain: (rows, columns), at least as many columns as rows.
    """
    rows, columns = gain.shape
    cost = -gain
    of_row, of_column = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = [0] * (columns + 1)  # row of each column, counted from 1; 0 is none
    for row in range(1, rows + 1):
        owner[0] = row
        _augment(cost, of_row, of_column, owner)
    found = [0] * rows
    for column in range(1, columns + 1):
        if owner[column]:
            found[owner[column] - 1] = column - 1
    return found


def _augment(cost: Matrix, of_row: Matrix, of_column: Matrix, owner: list[int]) -> None:
    """Give the row in `owner[0]` a column along a shortest path, and keep the potentials right."""
    columns = len(owner) - 1
    least = np.full(columns + 1, np.inf)
    before = [0] * (columns + 1)
    done = [False] * (columns + 1)
    column = 0
    while owner[column]:
        done[column] = True
        row, step, following = owner[column], np.inf, 0
        for other in range(1, columns + 1):
            if done[other]:
                continue
            reduced = cost[row - 1, other - 1] - of_row[row] - of_column[other]
            if reduced < least[other]:
                least[other], before[other] = reduced, column
            if least[other] < step:
                step, following = least[other], other
        for other in range(columns + 1):
            if done[other]:
                of_row[owner[other]] += step
                of_column[other] -= step
            else:
                least[other] -= step
        column = following
    while column:
        owner[column] = owner[before[column]]
        column = before[column]


def match_heads(gain: Matrix) -> list[int]:
    """A source head (column) for every target head (row); source heads serve several where they are fewer."""
    rows, columns = gain.shape
    copies = -(-rows // columns)
    return [column % columns for column in assign(np.tile(gain, (1, copies)))]


def cosine(first: Sequence[Matrix], second: Sequence[Matrix]) -> float:
    """Cosine of LᵀR for two pairs (L, R), L and R (d, h), without forming any h×h matrix."""
    (a, b), (c, d) = first, second
    norms = [float(((x @ x.T) * (y @ y.T)).sum()) for x, y in ((a, b), (c, d))]
    if min(norms) <= 0:
        return 0.0
    return float(((a @ c.T) * (b @ d.T)).sum()) / float(np.sqrt(norms[0] * norms[1]))
