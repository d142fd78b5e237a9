"""Dense deltas a few rows at a time, for the methods that look at single entries of ΔWᵢ.

What such a method needs to know of the whole matrix, order statistics and energies, is gathered exactly in passes over
tiles of a size that a core's own cache holds; a whole d_out×d_in matrix is there only when it is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from merge import entry_loops
from merge.rules import MASK_ROWS, compiled
from merge.stack import Stack

BLOCK_ROWS = MASK_ROWS
TILE_BYTES = 1 << 19
"""Of the deltas that are there at a time, in the cache of one core."""
TILE_COLUMNS = 64
"""A tile's width is a multiple of it."""
WHOLE = 1 << 20
"""Entries up to which a matrix is taken as a whole."""
SAMPLE = 1 << 16
"""Entries drawn to bracket an order statistic of a larger one."""
MARGIN = 3.2
"""Half the width of a first bracket, in standard deviations of a sample's quantile: one in 700 misses."""

Measure = Callable[[Tensor], Tensor]
"""Entries of the deltas (N, …) → values (channels, …)."""


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

    def tiles(self, *, whole_rows: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, first column, the deltas from there (N, ≤ BLOCK_ROWS, …)), row by row. The next overwrites it."""
        d_out, d_in = self.shape
        width = d_in if whole_rows else self._tile_width()
        buffer = self.A[0].new_empty(len(self.A) * min(BLOCK_ROWS, d_out) * width)
        columns = [(start, [A[:, start : start + width] for A in self.A]) for start in range(0, d_in, width)]
        for row in range(0, d_out, BLOCK_ROWS):
            parts_B = [B[row : row + BLOCK_ROWS] for B in self.B]
            for column, parts_A in columns:
                shape = len(self.A), parts_B[0].shape[0], parts_A[0].shape[1]
                tile = buffer[: math.prod(shape)].view(shape)
                for part_A, part_B, rows in zip(parts_A, parts_B, tile, strict=True):
                    torch.mm(part_B, part_A, out=rows)
                yield row, column, tile

    def _tile_width(self) -> int:
        """A device of its own has no use for tiles of a core's cache."""
        d_in = self.shape[1]
        if self.A[0].device.type != "cpu":
            return d_in
        fitting = TILE_BYTES // (len(self.A) * BLOCK_ROWS * self.A[0].element_size())
        return min(d_in, max(fitting // TILE_COLUMNS, 1) * TILE_COLUMNS)

    def sample(self) -> Tensor:
        """(N, SAMPLE) entries at random places, the same places for all."""
        generator = torch.Generator().manual_seed(SAMPLE)
        rows, columns = (torch.randint(side, (SAMPLE,), generator=generator) for side in self.shape)
        if not compiled(self.A[0]):
            pairs = zip(self.A, self.B, strict=True)
            return torch.stack([(B[rows.to(B.device)] * A[:, columns.to(A.device)].T).sum(1) for A, B in pairs])
        result = torch.empty(len(self.A), SAMPLE)
        for A, B, drawn in zip(self.A, self.B, result, strict=True):
            transposed = A.T.contiguous().numpy()
            entry_loops.products(transposed, B.numpy(), rows.numpy(), columns.numpy(), drawn.numpy())
        return result


def largest(deltas: DeltaRows, measure: Measure, counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each channel and count k the k-th largest |value|, exactly; ∞ for k = 0, 0 for k of all or more.

    A small matrix is sorted as a whole. Of a large one a sample brackets the value, and one pass over the rows counts
    what lies above the bracket and keeps what lies in it; only a bracket that missed costs another pass.
    """
    if deltas.entries <= WHOLE:
        values = torch.cat([measure(tile).abs().flatten(1) for _, _, tile in deltas.tiles()], 1)
        return [
            [_kth(channel, k) if k < len(channel) else 0.0 for k in wanted]
            for channel, wanted in zip(values, counts, strict=True)
        ]
    found = [[0.0 if k else float("inf") for k in wanted] for wanted in counts]
    open_ = [(c, t) for c, wanted in enumerate(counts) for t, k in enumerate(wanted) if 0 < k < deltas.entries]
    sample = measure(deltas.sample()).abs().sort(dim=1, descending=True).values
    margin = MARGIN
    while open_:
        found_now = _bracketed(deltas, measure, sample, {place: counts[place[0]][place[1]] for place in open_}, margin)
        for (channel, number), value in found_now.items():
            found[channel][number] = value
        open_ = [place for place in open_ if place not in found_now]
        margin *= 8
    return found


@dataclass(slots=True, eq=False)
class _Bracket:
    """What a pass has seen of the values of a channel: how many lay above `high`, and those from `low` to `high`."""

    low: float
    high: float
    above: int = 0
    count: int = 0
    inside: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def around(cls, share: float, sample: Tensor, margin: float) -> Self:
        """Of the value that a share of all is above; `sample` is sorted, the largest first."""
        half = margin * math.sqrt(share * (1 - share) / SAMPLE)
        upper, lower = share - half, share + half
        high = float(sample[int(upper * SAMPLE)]) if upper > 0 else float("inf")
        low = float(sample[int(lower * SAMPLE)]) if lower < 1 else 0.0
        return cls(low, high)

    def add(self, values: Tensor) -> None:
        """See values (…) of either sign."""
        room = self.count + values.numel() + entry_loops.GLANCE
        if len(self.inside) < room:
            grown = values.new_empty(2 * room)
            grown[: self.count] = self.inside[: self.count]
            self.inside = grown
        if compiled(values):
            low, high = np.float32(self.low), np.float32(self.high)
            above, self.count = entry_loops.bracketed(
                values.view(-1).numpy(), low, high, self.inside.numpy(), self.count
            )
            self.above += above
        else:
            sizes = values.abs()
            self.above += int((sizes > self.high).count_nonzero())
            kept = sizes[(sizes >= self.low) & (sizes <= self.high)]
            self.inside[self.count : self.count + len(kept)] = kept
            self.count += len(kept)

    def kth(self, k: int) -> float | None:
        """The k-th largest of all that was seen; None when it is not in the bracket."""
        inside = self.above < k <= self.above + self.count
        return _kth(self.inside[: self.count], k - self.above) if inside else None


def _bracketed(
    deltas: DeltaRows, measure: Measure, sample: Tensor, wanted: dict[tuple[int, int], int], margin: float
) -> dict[tuple[int, int], float]:
    """Those of the wanted values (by channel and number: k) that lie in the bracket that the sample gives them."""
    brackets = {place: _Bracket.around(k / deltas.entries, sample[place[0]], margin) for place, k in wanted.items()}
    for _, _, tile in deltas.tiles():
        values = measure(tile)
        for (channel, _), bracket in brackets.items():
            bracket.add(values[channel])
    found = {place: bracket.kth(wanted[place]) for place, bracket in brackets.items()}
    return {place: value for place, value in found.items() if value is not None}


def _kth(values: Tensor, k: int) -> float:
    """The k-th largest of (m,) values."""
    if k == 0:
        return float("inf")
    place = len(values) - k
    if values.device.type == "cpu":  # numpy selects many times faster than torch
        return float(np.partition(values.numpy(), place)[place])
    return float(values.kthvalue(place + 1).values)
