"""A sequence in another order that keeps how often each dinucleotide occurs: what a model of order is held against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def dinucleotide_shuffle(codes: NDArray[np.uint8], drawn: np.random.Generator) -> NDArray[np.uint8]:
    """One of all sequences with the same first letter and the same count of every dinucleotide, all equally likely.

    Every letter is a vertex and every dinucleotide an edge; a sequence is a walk along all edges (Altschul and Erickson
    1985). Drawn are, for every letter but the last one, the edge by which the walk leaves it for the last time, until
    these edges lead to the last letter from everywhere; the other edges come in any order.

    Args:
        codes: (nucleotides,) of `train.transcripts.nucleotides`, of which the other letters are one letter too.
    """
    if len(codes) == 0:
        return codes.copy()
    last = int(codes[-1])
    edges = {int(letter): codes[1:][codes[:-1] == letter] for letter in np.unique(codes[:-1])}
    final = _final_edges(edges, last, drawn)
    orders = {}
    for letter, ends in edges.items():
        if letter in final:
            others = np.delete(ends, final[letter])
            orders[letter] = [*drawn.permutation(others).tolist(), int(ends[final[letter]])]
        else:
            orders[letter] = drawn.permutation(ends).tolist()
    taken = dict.fromkeys(orders, 0)
    found = [int(codes[0])]
    for _ in range(len(codes) - 1):
        letter = found[-1]
        found.append(orders[letter][taken[letter]])
        taken[letter] += 1
    return np.array(found, np.uint8)


def _final_edges(edges: dict[int, NDArray[np.uint8]], last: int, drawn: np.random.Generator) -> dict[int, int]:
    """Letter → the place of its final edge; together they lead to `last` from every letter."""
    letters = [letter for letter in edges if letter != last]
    while True:
        final = {letter: int(drawn.integers(len(edges[letter]))) for letter in letters}
        if all(_arrives(letter, edges, final, last) for letter in letters):
            return final


def _arrives(letter: int, edges: dict[int, NDArray[np.uint8]], final: dict[int, int], last: int) -> bool:
    for _ in range(len(final) + 1):
        if letter == last:
            return True
        letter = int(edges[letter][final[letter]])
    return False
