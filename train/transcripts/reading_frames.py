"""The longest open reading frame of a transcript."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from train.transcripts.nucleotides import codes_of, reverse_complement, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODON = 3


def _word(codon: str) -> int:
    return int(words_of(codes_of(codon), CODON)[0])


START = _word("ATG")
STOPS = tuple(map(_word, ("TAA", "TAG", "TGA")))


class Frame(NamedTuple):
    """A reading frame: nucleotides `start` to `end` (not included) of a strand, in that strand's own direction."""

    start: int
    end: int
    reverse: bool = False

    @property
    def length(self) -> int:
        """Nucleotides, a stop codon included."""
        return self.end - self.start


def longest_frame(codes: NDArray[np.uint8], six_frames: bool = False) -> Frame | None:
    """The longest run of codons from an ATG to the first stop, which belongs to it, or else to the last whole codon.

    Of equally long ones the first: the strand as it is before the other one, frame by frame, from 5' to 3'. A codon
    with a letter other than A C G T is neither start nor stop. None where there is no ATG.

    Args:
        codes: (nucleotides,) of `codes_of`.
        six_frames: look at the reverse complement too.
    """
    found = list(_frames(codes, reverse=False))
    if six_frames:
        found += _frames(reverse_complement(codes), reverse=True)
    return max(found, key=lambda frame: frame.length, default=None)


def part_of(codes: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """The nucleotides of a frame."""
    strand = reverse_complement(codes) if frame.reverse else codes
    return strand[frame.start : frame.end]


def _frames(codes: NDArray[np.uint8], *, reverse: bool) -> Iterator[Frame]:
    """The outermost reading frames of a strand."""
    words = words_of(codes, CODON)
    for shift in range(CODON):
        codons = words[shift::CODON]
        starts = np.flatnonzero(codons == START)
        stops = np.flatnonzero(np.isin(codons, STOPS))
        after = np.searchsorted(stops, starts)
        # Of the starts before the same stop the first one gives the longest.
        for stop, place in zip(*np.unique(after, return_index=True), strict=True):
            end = stops[stop] + 1 if stop < len(stops) else len(codons)
            yield Frame(shift + CODON * int(starts[place]), shift + CODON * int(end), reverse)
