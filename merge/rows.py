"""Dense deltas a few rows at a time, for the methods that look at single entries of ΔWᵢ.

What such a method needs to know of the whole matrix, order statistics and energies, is gathered exactly in passes over
the rows; a whole d_out×d_in matrix is there only when it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from merge.rules import MASK_ROWS
from merge.stack import Stack

BLOCK_ROWS = MASK_ROWS
WHOLE = 1 << 20
"""Entries up to which a matrix is taken as a whole."""
SAMPLE = 1 << 16
"""Entries drawn to bracket an order statistic of a larger one."""
MARGIN = 0.008
"""Half the width of a first bracket, as a share of the entries: four standard deviations of a sample's quantile."""

Measure = Callable[[Tensor], Tensor]
"""Entries of the deltas (N, …) → values that are not negative (channels, …)."""


@dataclass(frozen=True, slots=True, eq=False)
class DeltaRows:
    """The ΔWᵢ of a stack, by rows, in the order of `Stack.members`.

    Attributes:
        A: (rᵢ, d_in) of each owner; B: (d_out, rᵢ).
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    @classmethod
    def of(cls, stack: Stack) -> Self:
        return cls(
            tuple(stack.A[own] for _, own in stack.members),
            tuple(stack.B[:, own].contiguous() for _, own in stack.members),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.B[0].shape[0], self.A[0].shape[1]

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, the deltas' rows from there (N, ≤ BLOCK_ROWS, d_in)). A block is overwritten by the next."""
        d_out, d_in = self.shape
        buffer = self.A[0].new_empty(len(self.A), min(BLOCK_ROWS, d_out), d_in)
        for start in range(0, d_out, BLOCK_ROWS):
            block = buffer[:, : min(BLOCK_ROWS, d_out - start)]
            for A, B, rows in zip(self.A, self.B, block, strict=True):
                torch.mm(B[start : start + BLOCK_ROWS], A, out=rows)
            yield start, block

    def sample(self) -> Tensor:
        """(N, SAMPLE) entries at random places, the same places for all."""
        generator = torch.Generator().manual_seed(SAMPLE)
        rows, columns = (torch.randint(side, (SAMPLE,), generator=generator) for side in self.shape)
        pairs = zip(self.A, self.B, strict=True)
        return torch.stack([(B[rows.to(B.device)] * A[:, columns.to(A.device)].T).sum(1) for A, B in pairs])


def largest(deltas: DeltaRows, measure: Measure, counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each channel and count k the k-th largest value, exactly; ∞ for k = 0, 0 for k of all or more.

    A small matrix is sorted as a whole. Of a large one a sample brackets the value, and one pass over the rows counts
    what lies above the bracket and keeps what lies in it; only a bracket that missed costs another pass.
    """
    if deltas.entries <= WHOLE:
        values = torch.cat([measure(block) for _, block in deltas.blocks()], 1).flatten(1)
        return [[_kth(channel, k) for k in wanted] for channel, wanted in zip(values, counts, strict=True)]
    found = [[0.0 if k else float("inf") for k in wanted] for wanted in counts]
    open_ = [(c, t) for c, wanted in enumerate(counts) for t, k in enumerate(wanted) if 0 < k < deltas.entries]
    sample = measure(deltas.sample()).sort(dim=1, descending=True).values
    margin = MARGIN
    while open_:
        found_now = _bracketed(deltas, measure, sample, {place: counts[place[0]][place[1]] for place in open_}, margin)
        for (channel, number), value in found_now.items():
            found[channel][number] = value
        open_ = [place for place in open_ if place not in found_now]
        margin *= 8
    return found


def _bracketed(
    deltas: DeltaRows, measure: Measure, sample: Tensor, wanted: dict[tuple[int, int], int], margin: float
) -> dict[tuple[int, int], float]:
    """Those of the wanted values (by channel and number: k) that lie in the bracket that the sample gives them."""
    brackets = {}
    for (channel, number), k in wanted.items():
        share = k / deltas.entries
        upper, lower = share - margin, share + margin
        high = float(sample[channel, int(upper * SAMPLE)]) if upper > 0 else float("inf")
        low = float(sample[channel, int(lower * SAMPLE)]) if lower < 1 else 0.0
        brackets[channel, number] = low, high
    above = dict.fromkeys(wanted, 0)
    inside: dict[tuple[int, int], list[Tensor]] = {place: [] for place in wanted}
    for _, block in deltas.blocks():
        values = measure(block)
        for place, (low, high) in brackets.items():
            of_channel = values[place[0]]
            above[place] += int((of_channel > high).count_nonzero())
            inside[place].append(of_channel[(of_channel >= low) & (of_channel <= high)])
    found = {}
    for place, k in wanted.items():
        kept = torch.cat(inside[place])
        if above[place] < k <= above[place] + len(kept):
            found[place] = _kth(kept, k - above[place])
    return found


def _kth(values: Tensor, k: int) -> float:
    """The k-th largest of (m,) values."""
    if k == 0:
        return float("inf")
    return float(values.kthvalue(len(values) - k + 1).values) if k < len(values) else 0.0
