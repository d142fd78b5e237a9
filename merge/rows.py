"""Dense deltas a few rows at a time, for the methods that look at single entries of ΔWᵢ.

What such a method needs to know of the whole matrix, order statistics and energies, is gathered exactly in passes over
tiles of a size that a core's own cache holds; a whole d_out×d_in matrix is there only when it is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from artifacts.errors import MergeRefused
from merge import entry_loops, rules
from merge.panel import LANES, ROWS
from merge.rules import compiled, kth_largest
from merge.stack import Stack

TILE_ROWS = 64
TILE_BYTES = 1 << 20
"""Of the deltas that are there at a time, in the cache of one core."""
TILE_COLUMNS = 64
"""A tile's width is a multiple of it."""
PAGE = 1024
"""Numbers of float32; entries as far apart, or a multiple of it, take turns in the same places of a core's cache."""
WHOLE = 1 << 20
"""Entries up to which a matrix is taken as a whole."""
SAMPLE = 1 << 16
"""Entries drawn to bracket an order statistic of a larger one."""
BRACKETED, DRAWN = 1 << 17, 1 << 14
"""Entries from which `kth_size` brackets the value, and about how many it draws for that."""
MARGIN = 3.2
"""Half the width of a first bracket, in standard deviations of a sample's quantile: one in 700 misses."""
NARROW_MARGIN = 2.5
"""The same where one that misses, one in 80, costs no more than a selection."""

Measure = Callable[[Tensor], Tensor]
"""Entries of the deltas (N, …) → values (channels, …)."""


@dataclass(frozen=True, eq=False)
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

    def tiles(self, rows: range | None = None, *, whole_rows: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, first column, the deltas from there (N, …, …)), row by row. The next overwrites it.

        Args:
            rows: those to come, with a step of 1; None: all.
        """
        rows, d_in = rows or range(self.shape[0]), self.shape[1]
        height, width = self._tile_shape(whole_rows)
        buffer = self.A[0].new_empty(len(self.A) * min(height, len(rows)) * width)
        for row in rows[::height]:
            for column in range(0, d_in, width):
                shape = len(self.A), min(height, rows.stop - row), min(width, d_in - column)
                tile = buffer[: math.prod(shape)].view(shape)
                self._form(row, column, tile)
                yield row, column, tile

    def each(self) -> Iterator[Tensor]:
        """The ΔWᵢ one after the other. The next overwrites it."""
        whole = self.A[0].new_empty(1, *self.shape)
        for A, B in zip(self.A, self.B, strict=True):
            if compiled(A):
                entry_loops.form(A.numpy(), B.numpy(), np.array([0, len(A)]), 0, 0, whole.numpy())
            else:
                torch.mm(B, A, out=whole[0])
            yield whole[0]

    def elected(self, weights: Tensor, election: rules.Election, window: rules.Window | None) -> Tensor:
        """(d_out, d_in) `rules.elected_sum` of the ΔWᵢ, formed in tiles and not kept."""
        result = self.A[0].new_empty(self.shape)
        if compiled(self.A[0]):
            A, B, starts = self._stacked
            of_weights, ones = rules.floats(weights, result), np.ones(len(self.A), np.float32)
            height, width = self._tile_shape(whole_rows=False)
            borders = rules.borders(len(self.A), result, window)
            entry_loops.form_elected(
                A, B, starts, *borders, ones, of_weights, ones, election == "frequency", height, width, result.numpy()
            )
            return result
        for row, column, tile in self.tiles():
            merged = rules.elected_sum(tile, weights, election, window)
            result[row : row + tile.shape[1], column : column + tile.shape[2]] = merged
        return result

    @cached_property
    def _form(self) -> Callable[[int, int, Tensor], None]:
        """What fills a tile with the entries from a row and a column on."""
        if compiled(self.A[0]):
            A, B, starts = self._stacked
            return lambda row, column, tile: entry_loops.form(A, B, starts, row, column, tile.numpy())

        def form(row: int, column: int, tile: Tensor) -> None:
            for A, B, rows in zip(self.A, self.B, tile, strict=True):
                torch.mm(B[row : row + rows.shape[0]], A[:, column : column + rows.shape[1]], out=rows)

        return form

    @cached_property
    def _stacked(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """(n, d_in or more) and (d_out, n) of all owners, and (N + 1,) where the components of each begin.

        Rows whose beginnings are whole pages apart would share a few places of a core's cache: those are padded.
        """
        starts = np.cumsum([0, *(len(part) for part in self.A)])
        d_in = self.shape[1]
        A = np.empty((starts[-1], d_in + LANES if d_in % PAGE == 0 else d_in), np.float32)
        A[:, :d_in] = torch.cat(self.A).numpy()
        return A, torch.cat(self.B, 1).numpy(), starts

    def _tile_shape(self, whole_rows: bool) -> tuple[int, int]:
        """Rows and columns. A device of its own has no use for tiles of a core's cache."""
        d_in = self.shape[1]
        if self.A[0].device.type != "cpu":
            return TILE_ROWS, d_in
        fitting = TILE_BYTES // (len(self.A) * self.A[0].element_size())
        if whole_rows:
            return min(max(fitting // d_in // ROWS, 1) * ROWS, TILE_ROWS), d_in
        return TILE_ROWS, min(d_in, max(fitting // TILE_ROWS // TILE_COLUMNS, 1) * TILE_COLUMNS)

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

    Raises:
        MergeRefused: the measure of an entry is NaN, for the deltas are too large for their dtype.
    """
    if deltas.entries <= WHOLE:
        values = _numbers(torch.cat([measure(tile).abs().flatten(1) for _, _, tile in deltas.tiles()], 1))
        return [
            [kth_largest(channel, k) if k < len(channel) else 0.0 for k in wanted]
            for channel, wanted in zip(values, counts, strict=True)
        ]
    found = [[0.0 if k else float("inf") for k in wanted] for wanted in counts]
    open_ = [(c, t) for c, wanted in enumerate(counts) for t, k in enumerate(wanted) if 0 < k < deltas.entries]
    sample = _descending(_numbers(measure(deltas.sample()).abs()))
    margin = MARGIN
    while open_:
        ranks = [counts[channel][number] for channel, number in open_]
        brackets = _Brackets.around(
            [(c, k / deltas.entries) for (c, _), k in zip(open_, ranks, strict=True)], sample, margin
        )
        for _, _, tile in deltas.tiles():
            brackets.add(measure(tile).flatten(1))
        missed = []
        for place, value in zip(open_, brackets.kth(ranks), strict=True):
            if value is None:
                missed.append(place)
            else:
                found[place[0]][place[1]] = value
        open_, margin = missed, 8 * margin
    return found


def overflow() -> MergeRefused:
    """The error of deltas, or of what is made of them, that their dtype can not hold."""
    return MergeRefused("The entries of ΔW overflow in the merge.", hint="Set compute_dtype to float64.")


def finite(values: Tensor) -> Tensor:
    """The values.

    Raises:
        MergeRefused: one of them is not finite.
    """
    # a sum makes no copy, but may overflow itself
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise overflow()
    return values


def kth_size(block: Tensor, k: int) -> float:
    """The k-th largest |entry|, 1 ≤ k ≤ entries, exactly. A large block on a CPU is read once, and not copied.

    Raises:
        MergeRefused: an entry is NaN.
    """
    entries = block.numel()
    if entries >= BRACKETED and k < entries and compiled(block):
        # an odd step visits all columns, unless their number shares a divisor with it
        drawn = block.view(-1)[:: entries // DRAWN | 1].abs()
        brackets = _Brackets.around([(0, k / entries)], _descending(_numbers(drawn[None])), NARROW_MARGIN)
        brackets.add(block.view(1, -1))
        (found,) = brackets.kth([k])
        if found is not None:
            return found
    return kth_largest(_numbers(block.abs().flatten()), k)


@dataclass(slots=True, eq=False)
class _Brackets:
    """What a pass has seen of some channels' |values|: how many lay above `high`, and those from `low` to `high`.

    Values at a border are only counted: they may be all of a matrix, as the zeros of a module that was never trained.

    Attributes:
        channels: (P,) the channel of each bracket.
        low, high: (P,).
        above, at_high, at_low, count: (P,) how many lay above, at the borders (one border: at `high`), and between.
        inside: (P, room) those strictly between, `count` of them.
    """

    channels: NDArray[np.int64]
    low: Tensor
    high: Tensor
    above: NDArray[np.int64]
    at_high: NDArray[np.int64]
    at_low: NDArray[np.int64]
    count: NDArray[np.int64]
    inside: Tensor

    @classmethod
    def around(cls, places: Sequence[tuple[int, float]], sample: Tensor, margin: float) -> Self:
        """Of the values that a share of all is above, by (channel, share); `sample` is sorted, the largest first."""
        low, high = [], []
        drawn = sample.shape[1]
        for channel, share in places:
            half = margin * math.sqrt(share * (1 - share) / drawn)
            upper, lower = share - half, share + half
            high.append(float(sample[channel, int(upper * drawn)]) if upper > 0 else float("inf"))
            low.append(float(sample[channel, int(lower * drawn)]) if lower < 1 else 0.0)
        above, at_high, at_low, count = np.zeros((4, len(places)), np.int64)
        return cls(
            np.array([channel for channel, _ in places]),
            sample.new_tensor(low),
            sample.new_tensor(high),
            above,
            at_high,
            at_low,
            count,
            sample.new_empty(len(places), 0),
        )

    def add(self, values: Tensor) -> None:
        """See values (channels, m) of either sign.

        Raises:
            MergeRefused: one of them is NaN.
        """
        room = int(self.count.max()) + values.shape[1] + 1
        if self.inside.shape[1] < room:
            grown = values.new_empty(len(self.inside), 2 * room)
            grown[:, : self.inside.shape[1]] = self.inside
            self.inside = grown
        if compiled(values):
            finite = entry_loops.bracketed(
                values.numpy(),
                self.channels,
                self.low.numpy(),
                self.high.numpy(),
                self.above,
                self.at_high,
                self.at_low,
                self.inside.numpy(),
                self.count,
            )
            if not finite:
                raise overflow()
            return
        values = _numbers(values)
        sizes = values.abs()
        for number, channel in enumerate(self.channels):
            of_channel = sizes[channel]
            self.above[number] += int((of_channel > self.high[number]).count_nonzero())
            at_high = of_channel == self.high[number]
            self.at_high[number] += int(at_high.count_nonzero())
            self.at_low[number] += int(((of_channel == self.low[number]) & ~at_high).count_nonzero())
            kept = of_channel[(of_channel > self.low[number]) & (of_channel < self.high[number])]
            self.inside[number, self.count[number] : self.count[number] + len(kept)] = kept
            self.count[number] += len(kept)

    def kth(self, ranks: Sequence[int]) -> list[float | None]:
        """By bracket, the k-th largest of all that was seen; None when it is not inside."""
        return [self._kth(number, k) for number, k in enumerate(ranks)]

    def _kth(self, number: int, k: int) -> float | None:
        k -= int(self.above[number])
        if k <= 0:
            return None
        k -= int(self.at_high[number])
        if k <= 0:
            return float(self.high[number])
        count = int(self.count[number])
        if k <= count:
            return kth_largest(self.inside[number, :count], k)
        return float(self.low[number]) if k - count <= self.at_low[number] else None


def _numbers(values: Tensor) -> Tensor:
    """The values, none of which is NaN: no bracket would ever hold that."""
    # a NaN makes the sum one, and a sum makes no copy
    if bool(values.sum().isnan()) and bool(values.isnan().any()):
        raise overflow()
    return values


def _descending(values: Tensor) -> Tensor:
    """Rows sorted, the largest first. (numpy sorts many times faster than torch.)"""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(1)
    return values.sort(dim=1, descending=True).values
