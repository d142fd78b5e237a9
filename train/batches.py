"""The order of the training rows, and which rank takes which rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import TypeVar

import torch
from torch.utils.data import Sampler

Item = TypeVar("Item")


class Batches(Sampler[list[int]]):
    """The numbers of the rows of each batch of an epoch, shuffled by seed and epoch; of each, the share of one rank.

    Whatever the number of ranks, a batch has the same rows, also the last one of an epoch, which may be short: nothing
    is dropped and nothing is taken twice. Then a share may be empty.

    The first batches can leave rows out, whose places other rows take, so that an epoch is as long as any other.

    Args:
        withheld: numbers of the rows that are left out; not all.
        until: epoch and number of the first batch that takes all rows again.

    Attributes:
        epoch: which order `iter` gives.
    """

    def __init__(
        self,
        rows: int,
        size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        *,
        withheld: Set[int] = frozenset(),
        until: tuple[int, int] = (0, 0),
    ) -> None:
        self._rows, self._size, self._seed = rows, size, seed
        self._rank, self._ranks = rank, ranks
        self._withheld, self._until = withheld, until
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        order: list[int] = torch.randperm(self._rows, generator=generator).tolist()
        left = [row for row in order if row not in self._withheld]
        for number, start in enumerate(range(0, self._rows, self._size)):
            batch = order[start : start + self._size]
            if (self.epoch, number) < self._until:
                batch = [left[place % len(left)] for place in range(start, start + len(batch))]
            yield share(batch, self._rank, self._ranks)


class EndlessRows:
    """Numbers of rows without an end: all of them in a new order in every round."""

    def __init__(self, rows: Sequence[int], seed: int) -> None:
        self.rows, self._seed = list(rows), seed
        self._round, self._order = -1, self.rows

    def take(self, first: int, count: int) -> list[int]:
        """`count` of them from place `first` on; the same at every call."""
        return [self._at(place) for place in range(first, first + count)]

    def _at(self, place: int) -> int:
        number, within = divmod(place, len(self.rows))
        if number != self._round:
            generator = torch.Generator().manual_seed(self._seed + number)
            order: list[int] = torch.randperm(len(self.rows), generator=generator).tolist()
            self._round, self._order = number, [self.rows[at] for at in order]
        return self._order[within]


def share(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    """The part of one rank: neighbours, in lengths that differ by at most one; all parts together are `items`."""
    first, last = (len(items) * number // ranks for number in (rank, rank + 1))
    return list(items[first:last])
