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

from merge import entry_loops, rules, strip_loops, strips
from merge.brackets import Brackets, Tally, descending, numbers, overflow
from merge.entry_rule import EntryRule
from merge.panel import LANES, ROWS
from merge.rules import compiled, kth_largest
from merge.stack import Stack
from merge.strips import BLOCK_ROWS, Strips

TILE_ROWS = 64
TILE_BYTES = 1 << 20
"""Of the deltas that are there at a time, in the cache of one core."""
TILE_COLUMNS = 64
"""A tile's width is a multiple of it."""
PAGE = 1024
"""Numbers of float32; entries as far apart, or a multiple of it, take turns in the same places of a core's cache."""
SORTED = 1 << 17
"""Entries up to which a matrix is sorted to find an order statistic."""
SAMPLE = 1 << 16
"""Entries drawn to bracket an order statistic of a larger one."""
NARROWED = 1 << 22
"""Entries from which a part of a matrix is looked at before all of it is."""
MARGIN = 3.2
"""Half the width of a first bracket, in standard deviations of a sample's quantile: one in 700 misses."""

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

    @cached_property
    def strips(self) -> Strips:
        """The factors as the loops on strips take them; only where `compiled`."""
        return Strips.of(self.A, self.B)

    @property
    def compiled(self) -> bool:
        """Whether the compiled loops take these deltas."""
        return compiled(self.A[0]) and self.shape[1] >= LANES

    def merged(self, rule: EntryRule, row: int, block: Tensor) -> None:
        """Fill a block (strips, BLOCK_ROWS, COLUMNS) with what the rule makes of the deltas from a row on."""
        strip_loops.merge(*self.strips, row, *rule.arguments(), block.numpy())

    def whole(self, rule: EntryRule) -> Tensor:
        """(d_out, d_in) what the rule makes of the ΔWᵢ, which are formed a few entries at a time and not kept."""
        result = self.A[0].new_empty(self.shape)
        if self.compiled:
            block = strips.new_block(self.shape[1], result)
            for row in range(0, self.shape[0], BLOCK_ROWS):
                self.merged(rule, row, block)
                rows = min(BLOCK_ROWS, self.shape[0] - row)
                result[row : row + rows] = strips.read(block, rows, self.shape[1])
            return result
        for row, column, tile in self.tiles():
            result[row : row + tile.shape[1], column : column + tile.shape[2]] = rule(row, column, tile)
        return result

    def energies(self, sizes: Tensor, least: float, tally: Tally | None = None) -> Tensor:
        """(N,) float64 Σ x² of each delta over the places where the variance of sizesᵢΔWᵢ is `least` or more.

        A complete tally of a bracket in which `least` lies makes a pass over all of them unnecessary.
        """
        if tally and tally.complete:
            X = self.A[0].new_empty(len(self.A), 1, int(tally.listed[0]))
            strip_loops.gathered(*self.strips, tally.places[: X.shape[2]], X[:, 0].numpy())
            return torch.from_numpy(tally.energies) + rules.energies(X, rules.variance(X, sizes) >= least)
        if self.compiled:
            result = np.zeros(len(self.A))
            strip_loops.energies(*self.strips, rules.floats(sizes, self.A[0]), np.float32(least), result)
            return torch.from_numpy(result)
        total = torch.zeros(len(self.A), dtype=torch.float64, device=sizes.device)
        for _, _, tile in self.tiles():
            total += rules.energies(tile, rules.variance(tile, sizes) >= least)
        return total

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
        pairs = zip(self.A, self.B, strict=True)
        return torch.stack([(B[rows.to(B.device)] * A[:, columns.to(A.device)].T).sum(1) for A, B in pairs])

    def sample_of_neighbours(self) -> Tensor:
        """(N, about a quarter of SAMPLE) entries of evenly spread rows, as the compiled loops draw them fast."""
        d_out, d_in = self.shape
        wanted = SAMPLE // (4 * LANES)
        every, times = max(d_out // wanted, 1), -(-wanted // d_out)
        generator = torch.Generator().manual_seed(SAMPLE)
        A, B, starts = self._stacked
        B = np.ascontiguousarray(B[::every])
        places = torch.randint(d_in - LANES + 1, (len(B), times), generator=generator)
        result = torch.empty(len(self.A), len(B), times, LANES)
        strip_loops.sampled(A, B, starts, places.numpy(), result.numpy())
        return result.flatten(1)


@dataclass(frozen=True, eq=False)
class Variance:
    """The measure of how much the deltas times `sizes` (N,) vary in a place; a `tally` is made where there is one."""

    sizes: Tensor
    tally: Tally | None = None

    def __call__(self, X: Tensor) -> Tensor:
        return rules.variance(X, self.sizes)[None]


def entries(X: Tensor) -> Tensor:
    """The measure that tells of each delta its entries."""
    return X


def largest(deltas: DeltaRows, measure: Measure, counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """For each channel and count k the k-th largest |value|, exactly; ∞ for k = 0, 0 for k of all or more.

    A small matrix is sorted as a whole. Of a large one a sample brackets the value, and one pass over the rows counts
    what lies above the bracket and keeps what lies in it; only a bracket that missed costs another pass.

    Raises:
        MergeRefused: the measure of an entry is NaN, for the deltas are too large for their dtype.
    """
    if deltas.entries <= SORTED:
        values = numbers(torch.cat([measure(tile).abs().flatten(1) for _, _, tile in deltas.tiles()], 1))
        return [
            [kth_largest(channel, k) if k < len(channel) else 0.0 for k in wanted]
            for channel, wanted in zip(values, counts, strict=True)
        ]
    found = [[0.0 if k else float("inf") for k in wanted] for wanted in counts]
    open_ = [(c, t) for c, wanted in enumerate(counts) for t, k in enumerate(wanted) if 0 < k < deltas.entries]
    looped = deltas.compiled and (measure is entries or isinstance(measure, Variance))
    sample = descending(numbers(measure(deltas.sample_of_neighbours() if looped else deltas.sample()).abs()))
    margin = MARGIN
    while open_:
        ranks = [counts[channel][number] for channel, number in open_]
        shares = [k / deltas.entries for k in ranks]
        brackets = Brackets.around([(c, share) for (c, _), share in zip(open_, shares, strict=True)], sample, margin)
        if looped:
            sizes, tally = (measure.sizes, measure.tally) if isinstance(measure, Variance) else (None, None)
            if deltas.entries >= NARROWED and margin == MARGIN:
                brackets = brackets.narrowed(shares, deltas.strips, deltas.shape, sizes)
            brackets.add_all(deltas.strips, sizes, tally)
        else:
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


def finite(values: Tensor) -> Tensor:
    """The values.

    Raises:
        MergeRefused: one of them is not finite.
    """
    # a sum makes no copy, but may overflow itself
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise overflow()
    return values


def trimming(deltas: DeltaRows, density: float) -> rules.Window | None:
    """The window of the largest |entries| of each delta, a `density` of all; those at the border all stay.

    Raises:
        MergeRefused: an entry is NaN, for the deltas are too large for their dtype.
    """
    kept = rules.kept_count(density, deltas.entries)
    if kept >= deltas.entries:
        return None
    lower = deltas.A[0].new_tensor([border for (border,) in largest(deltas, entries, [[kept]] * len(deltas.A))])
    return rules.Window(lower, torch.full_like(lower, math.inf))
