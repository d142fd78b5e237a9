"""Order statistics of numbers that come in pieces: a bracket round each, and a count of what lies beyond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from artifacts.errors import MergeRefused
from merge import rules, strip_loops
from merge.panel import COLUMNS, ROWS
from merge.rules import kth_largest
from merge.strips import BLOCK_ROWS, Strips

EVERY = 16
"""Panels of which one narrows the brackets down, a power of two."""
PANELS_MARGIN = 3.5
"""As `rows.MARGIN`, of a sample of panels: even where rows and columns differ much, it is as good as one of entries."""


def overflow() -> MergeRefused:
    """The error of deltas, or of what is made of them, that their dtype can not hold."""
    return MergeRefused("The entries of ΔW overflow in the merge.", hint="Set compute_dtype to float64.")


@dataclass(slots=True, eq=False)
class Tally:
    """The energies of the deltas where their variance is above a bracket, and the places where it is inside.

    Attributes:
        energies: (N,); places: (room,), `listed` of them; more than there is room for: the tally is of no use.
    """

    energies: NDArray[np.float64]
    places: NDArray[np.int64]
    listed: NDArray[np.int64]

    @classmethod
    def of(cls, count: int, room: int) -> Self:
        """One that is yet to be made."""
        return cls(np.zeros(count), np.empty(room, np.int64), np.array([room + 1]))

    @property
    def complete(self) -> bool:
        return int(self.listed[0]) <= len(self.places)

    def clear(self) -> None:
        self.energies[:], self.listed[:] = 0, 0


@dataclass(slots=True, eq=False)
class Brackets:
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
        channels = np.array([channel for channel, _ in places])
        return cls._new(channels, sample.new_tensor(low), sample.new_tensor(high))

    @classmethod
    def _new(cls, channels: NDArray[np.int64], low: Tensor, high: Tensor) -> Self:
        above, at_high, at_low, count = np.zeros((4, len(low)), np.int64)
        return cls(channels, low, high, above, at_high, at_low, count, low.new_empty(len(low), 0))

    def add(self, values: Tensor) -> None:
        """See values (channels, m) of either sign.

        Raises:
            MergeRefused: one of them is NaN.
        """
        self._make_room(values.shape[1])
        values = numbers(values)
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

    def add_all(self, deltas: Strips, sizes: Tensor | None, tally: Tally | None = None) -> None:
        """See all entries of each of the deltas, or the variance of sizesᵢΔWᵢ, with a tally of the only bracket.

        Zeros beyond the last row and column are seen too: they come after all entries, and change no rank of one.

        Raises:
            MergeRefused: one of them is NaN.
        """
        if tally:
            tally.clear()
        for row in range(0, len(deltas.B), BLOCK_ROWS):
            self._look(deltas, row, BLOCK_ROWS, 1, sizes, tally)

    def narrowed(self, shares: Sequence[float], deltas: Strips, shape: tuple[int, int], sizes: Tensor | None) -> Self:
        """Brackets of the same shares, by a look at one of `EVERY` panels. (d_out, d_in) may not fill the strips.

        Raises:
            MergeRefused: an entry is NaN.
        """
        A, B = deltas.A[: shape[1] // COLUMNS], deltas.B[: shape[0] // (EVERY * ROWS) * EVERY * ROWS]
        if not A.size or not B.size:  # a side so short has no panel to be looked at
            return self
        self._look(Strips(A, B, deltas.starts), 0, len(B), EVERY, sizes)
        seen = len(A) * len(B) * COLUMNS // EVERY
        low, high = self.low.clone(), self.high.clone()
        for number, share in enumerate(shares):
            half = PANELS_MARGIN * math.sqrt(share * (1 - share) / seen)
            for border, rank in ((high, int((share - half) * seen)), (low, math.ceil((share + half) * seen))):
                found = self._kth(number, rank)
                if found is not None:
                    border[number] = found
        return self._new(self.channels, low, high)

    def _look(
        self, deltas: Strips, row: int, rows: int, every: int, sizes: Tensor | None, tally: Tally | None = None
    ) -> None:
        """See the panels of some rows, or one of so many."""
        self._make_room(rows * len(deltas.A) * COLUMNS // every)
        of_sizes = np.empty(0, np.float32) if sizes is None else rules.floats(sizes, self.low)
        counts = self.above, self.at_high, self.at_low, self.inside.numpy(), self.count
        borders = self.channels, self.low.numpy(), self.high.numpy()
        tally = tally or Tally.of(0, 0)
        tallied = tally.energies, tally.places, tally.listed
        if not strip_loops.bracketed(*deltas, row, rows, every, of_sizes, *borders, *counts, *tallied):
            raise overflow()

    def _make_room(self, more: int) -> None:
        """For as many in each bracket as may come."""
        seen = int(self.count.max())
        room = seen + more + 1
        if self.inside.shape[1] < room:
            grown = self.inside.new_empty(len(self.inside), 2 * room)
            grown[:, :seen] = self.inside[:, :seen]
            self.inside = grown

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


def numbers(values: Tensor) -> Tensor:
    """The values, none of which is NaN: no bracket would ever hold that."""
    # a NaN makes the sum one, and a sum makes no copy
    if bool(values.sum().isnan()) and bool(values.isnan().any()):
        raise overflow()
    return values


def descending(values: Tensor) -> Tensor:
    """Rows sorted, the largest first. (numpy sorts many times faster than torch.)"""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(1)
    return values.sort(dim=1, descending=True).values
