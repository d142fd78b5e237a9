"""Nucleotides as small numbers: A C G T are 0 1 2 3, any other letter is 4; U is T, case makes no difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LETTERS = "ACGT"
OTHER = 4


def _table() -> bytes:
    table = bytearray([OTHER] * 256)
    for code, letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
        for letter in letters:
            table[ord(letter)] = code
    return bytes(table)


_TABLE = _table()


def codes_of(sequence: str) -> NDArray[np.uint8]:
    """(nucleotides,) codes."""
    return np.frombuffer(sequence.encode("ascii", "replace").translate(_TABLE), dtype=np.uint8)


def text_of(codes: NDArray[np.uint8]) -> str:
    """The sequence in A C G T, and N for the others."""
    return "".join((LETTERS + "N")[code] for code in codes)


def reverse_complement(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The other strand, read in its own direction."""
    turned = codes[::-1]
    return np.where(turned == OTHER, OTHER, 3 - turned).astype(np.uint8)


def words_of(codes: NDArray[np.uint8], length: int, stride: int = 1) -> NDArray[np.int64]:
    """Every word of `length` nucleotides, as a number in base 4, the first nucleotide its highest digit.

    Returns:
        ((nucleotides − length) // stride + 1,) numbers below 4^length; 4^length for a word with another letter; none
        of a sequence that is shorter than a word.
    """
    count = len(codes) - length + 1
    if count < 1:
        return np.zeros(0, np.int64)
    found, broken = np.zeros(count, np.int64), np.zeros(count, bool)
    for place in range(length):
        part = codes[place : place + count]
        found = found * 4 + part
        broken |= part == OTHER
    found[broken] = 4**length
    return found[::stride]
